"""Where the tensors of a model come from: each is read, or made, when it is asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.hf_folder import checked_shapes
from hypermoe_ds.checkpoint.safetensors_folder import FolderWeights, TakenTensors
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM, state_dict_shapes
from hypermoe_ds.progress import progress


class WeightLoader(Protocol):
    """The tensors of a model, one at a time.

    Attributes:
        config: the model.
        dtype: precision of the tensors.
        shapes: names and shapes of what a file of the model holds, in the model's order.
    """

    @property
    def config(self) -> HyperMoEConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shapes(self) -> Mapping[str, torch.Size]: ...

    def read(self, name: str) -> Tensor:
        """A tensor, in `dtype`."""
        ...


@dataclass(frozen=True)
class LazyWeights:
    """A source whose tensors each come from a function.

    Attributes:
        config: the model.
        dtype: precision of the tensors.
        readers: by name what gives a tensor, in whatever precision.
    """

    config: HyperMoEConfig
    dtype: torch.dtype
    readers: Mapping[str, Callable[[], Tensor]]

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Names and shapes, in the model's order."""
        return state_dict_shapes(self.config)

    def read(self, name: str) -> Tensor:
        """A tensor, in `dtype`."""
        return self.readers[name]().to(self.dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all of them in turn, and show the progress.

        Raises:
            UserError: one holds NaN or Inf.
        """
        for name in progress(self.shapes, "convert", "tensors", len(self.shapes)):
            tensor = self.read(name)
            if not tensor.isfinite().all():
                raise UserError(name, "holds NaN or Inf", "choose a model that does not")
            yield name, tensor


def weights_of(model: HyperMoEForCausalLM) -> LazyWeights:
    """The tensors of a model in memory; they are not copied."""
    tensors = model.state_dict()
    readers = {name: partial(tensors.__getitem__, name) for name in state_dict_shapes(model.config)}
    return LazyWeights(model.config, model.dtype, readers)


def read_folder(folder: Path, config: HyperMoEConfig) -> LazyWeights:
    """Open the tensors of a HyperMoE folder, each compared with what its configuration says.

    Raises:
        UserError: a tensor is missing, has another shape, or belongs to no part of the model.
    """
    taken = TakenTensors(FolderWeights(folder))
    shapes = checked_shapes(folder, config, taken.files.shapes)
    readers = {name: taken.reader(name, shape) for name, shape in shapes.items()}
    taken.refuse_the_rest(config)
    return LazyWeights(config, taken.files.dtype, readers)
