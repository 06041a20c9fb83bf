"""The tensors of a Hugging Face folder in the precisions that a model can have."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.hf_folder import FolderTensors, checked_shapes
from hypermoe_ds.errors import UserError
from hypermoe_ds.export.source import LazyWeights
from hypermoe_ds.modeling import HyperMoEConfig

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # kept by old versions; computed from rope_theta

Reader = Callable[[], Tensor]


class FolderWeights(FolderTensors):
    """Tensors by the names that the files give them.

    Args:
        folder: a Hugging Face folder with `model.safetensors`, or several files and their index.

    Attributes:
        dtype: the widest precision among the tensors.

    Raises:
        UserError: there are no safetensors, a file is missing or damaged, or a tensor is of another type.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name, stored in self.dtypes.items():
            if stored not in _DTYPES:
                where = f"{self.path_of(name)}: {name}"
                raise UserError(where, f"is stored as {stored}", f"save the model as one of {', '.join(_DTYPES)}")
        dtypes = {_DTYPES[stored] for stored in self.dtypes.values()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32


class TakenTensors:
    """Tensors of a folder, and which of them were asked for: none may be left over."""

    def __init__(self, files: FolderWeights) -> None:
        self.files = files
        self._names: set[str] = set()

    def holds(self, name: str) -> bool:
        return name in self.files.shapes

    def reader(self, name: str, shape: tuple[int, ...]) -> Reader:
        """What reads a tensor of this shape."""
        if not self.holds(name):
            raise UserError(f"{self.files.folder}: {name}", "is missing", "copy the folder again")
        found = tuple(self.files.shapes[name])
        if found != tuple(shape):
            raise UserError(
                f"{self.files.folder}: {name}",
                f"is {list(found)}, by config.json it is {list(shape)}",
                "mend config.json",
            )
        self._names.add(name)
        return partial(self.files.read, name)

    def refuse_the_rest(self, config: HyperMoEConfig) -> None:
        """Nothing is dropped without a word."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        for name in self.files.shapes:
            if name in self._names or _DERIVED.fullmatch(name):
                continue
            tied = name == head and config.tie_word_embeddings
            if tied and torch.equal(self.files.read(head), self.files.read(embedding)):
                continue
            reason = "differs from the embedding it is tied to" if tied else "has no place in HyperMoE"
            raise UserError(f"{self.files.folder}: {name}", reason, "choose a model without it")


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
