"""Load or compute the tensors of a model on demand."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.hf_folder import checked_shapes
from hypermoe_ds.checkpoint.safetensors_folder import FolderWeights, TrackedTensors
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM, state_dict_shapes
from hypermoe_ds.progress import progress


class WeightLoader(Protocol):
    """The tensors of a model, loaded one at a time.

    Attributes:
        config: configuration of the model.
        dtype: precision of the tensors.
        shapes: names and shapes of the tensors that are stored in weight files, in model order.
    """

    @property
    def config(self) -> HyperMoEConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shapes(self) -> Mapping[str, torch.Size]: ...

    def read(self, name: str) -> Tensor:
        """Return a tensor in `dtype`."""
        ...


@dataclass(frozen=True)
class LazyWeights:
    """The tensors of a model, each loaded by its own function.

    Attributes:
        config: configuration of the model.
        dtype: precision of the tensors.
        readers: for each tensor name, a function that returns the tensor in any precision.
    """

    config: HyperMoEConfig
    dtype: torch.dtype
    readers: Mapping[str, Callable[[], Tensor]]

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Names and shapes of the tensors, in model order."""
        return state_dict_shapes(self.config)

    def read(self, name: str) -> Tensor:
        """Return a tensor in `dtype`."""
        return self.readers[name]().to(self.dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors and show progress.

        Raises:
            UserError: a tensor contains NaN or Inf.
        """
        for name in progress(self.shapes, "convert", "tensors", len(self.shapes)):
            tensor = self.read(name)
            if not tensor.isfinite().all():
                raise UserError(name, "has NaN or Inf", "choose a model without NaN and Inf")
            yield name, tensor


def weights_of(model: HyperMoEForCausalLM) -> LazyWeights:
    """Return the tensors of an in-memory model, without copying them."""
    tensors = model.state_dict()
    readers = {name: partial(tensors.__getitem__, name) for name in state_dict_shapes(model.config)}
    return LazyWeights(model.config, model.dtype, readers)


def read_folder(folder: Path, model_config: HyperMoEConfig) -> LazyWeights:
    """Open the tensors of a HyperMoE folder and check them against its configuration.

    Raises:
        UserError: a tensor is missing, has the wrong shape, or is not part of the model.
    """
    taken = TrackedTensors(FolderWeights(folder))
    shapes = checked_shapes(folder, model_config, taken.files.shapes)
    readers = {name: taken.reader(name, shape) for name, shape in shapes.items()}
    taken.refuse_unused(model_config)
    return LazyWeights(model_config, taken.files.dtype, readers)
