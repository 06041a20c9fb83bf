"""Read the parameters of any model folder range by range, under their names in the training model.

A checkpoint and a Hugging Face folder can therefore be compared even if neither fits into memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.directory import find_checkpoint
from hypermoe_ds.checkpoint.expert_layout import training_shapes, training_view
from hypermoe_ds.checkpoint.hf_folder import read_config
from hypermoe_ds.checkpoint.manifest import MANIFEST
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.safetensors_folder import SafetensorsFolder
from hypermoe_ds.checkpoint.shards import WEIGHT, CheckpointReader
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig

Shape = tuple[int, ...]

_ELEMENTS_AT_ONCE = 2**20  # 4 MiB in fp32


@dataclass(frozen=True)
class Provenance:
    """Kind and origin of a folder.

    Attributes:
        path: the folder with the tensors.
        kind: "run folder", "checkpoint folder" or "Hugging Face folder".
        step: optimizer steps taken; None if unknown.
        files: size in bytes of each file with tensors.
        cut_tensors: number of tensors that are split across files.
        dtypes: dtypes of the stored tensors.
        written_by: git commit and package versions, if known.
        state: state of the run.
    """

    path: str
    kind: str
    step: int | None
    files: dict[str, int]
    cut_tensors: int
    dtypes: tuple[str, ...]
    written_by: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class TensorReader(ABC):
    """The parameters of one folder. Use the reader as a context manager, because it keeps files open.

    Attributes:
        provenance: kind and origin of the folder.
        shapes: shape of every parameter, by name in the training model.
        kinds: what is stored per parameter: "weight" and, after the first step, the optimizer's moments.
    """

    provenance: Provenance
    shapes: dict[str, Shape]
    kinds: tuple[str, ...]

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int, kind: str = WEIGHT) -> Tensor:
        """Read elements `start` to `stop` of a flattened parameter or moment, in fp32; [stop - start]."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def open_tensor_reader(path: Path, step: int | None = None) -> TensorReader:
    """Open a run folder, a checkpoint folder or a Hugging Face folder.

    Args:
        path: the folder.
        step: step of a run folder's checkpoint; None selects the newest. Ignored for other folders.

    Raises:
        UserError: the folder is of none of these kinds, is damaged, or does not have this step.
    """
    run = RunFolder(path)
    if run.exists():
        return CheckpointTensorReader(find_checkpoint(run.checkpoints, step), "run folder")
    if (path / MANIFEST).is_file():
        return CheckpointTensorReader(path, "checkpoint folder")
    if (path / "config.json").is_file():
        return HuggingFaceTensorReader(path)
    raise UserError(str(path), "is not a run folder, checkpoint folder or Hugging Face folder", "give one of them")


def ranges(elements: int, at_once: int = _ELEMENTS_AT_ONCE) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) ranges of at most `at_once` elements that cover `elements`."""
    for start in range(0, elements, at_once):
        yield start, min(start + at_once, elements)


class CheckpointTensorReader(TensorReader):
    """A checkpoint of a run.

    Args:
        folder: the checkpoint.
        kind: kind of folder that the user gave: "run folder" or "checkpoint folder".

    Raises:
        UserError: a file is missing or differs from the manifest.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._reader = CheckpointReader(folder)
        manifest = self._reader.manifest
        self.shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
        self.kinds = manifest.kinds
        self.provenance = Provenance(
            path=str(folder),
            kind=kind,
            step=manifest.step,
            files={name: entry.bytes for name, entry in manifest.files.items() if name.endswith(".safetensors")},
            cut_tensors=sum(len({piece.shard for piece in entry.pieces}) > 1 for entry in manifest.tensors.values()),
            dtypes=("F32",),
            written_by=manifest.written_by,
            state=manifest.state,
        )

    def read_range(self, name: str, start: int, stop: int, kind: str = WEIGHT) -> Tensor:
        return self._reader.read_range(name, start, stop, kind)

    def close(self) -> None:
        self._reader.__exit__(None, None, None)


class HuggingFaceTensorReader(TensorReader):
    """A Hugging Face folder with safetensors files; HyperMoE experts are renamed as in the training model.

    Args:
        folder: the folder.

    Raises:
        UserError: a file is missing or damaged.
    """

    kinds = (WEIGHT,)

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        self._files = tensors = SafetensorsFolder(folder)
        self._mapped = ("", torch.empty(0))
        splits = config.get("model_type") == HyperMoEConfig.model_type
        self._stored_as: dict[str, str] = {}
        self.shapes = {}
        for stored, shape in tensors.shapes.items():
            parts = training_shapes(stored, shape) if splits else {stored: shape}
            self._stored_as |= dict.fromkeys(parts, stored)
            self.shapes |= {name: tuple(of_part) for name, of_part in parts.items()}
        version = config.get("transformers_version")
        self.provenance = Provenance(
            path=str(folder),
            kind="Hugging Face folder",
            step=None,
            files={path.name: path.stat().st_size for path in tensors.paths},
            cut_tensors=0,
            dtypes=tuple(sorted(set(tensors.dtypes.values()))),
            written_by={"transformers": version} if isinstance(version, str) else {},
        )

    def read_range(self, name: str, start: int, stop: int, kind: str = WEIGHT) -> Tensor:
        assert kind == WEIGHT
        stored = self._stored_as[name]
        whole = self._map(stored) if stored == name else training_view(self._map(stored), name)
        # w1 and w3 consist of one contiguous block per expert; any other tensor is a single block.
        block = max(whole.numel() if whole.is_contiguous() else whole[0].numel(), 1)
        values = torch.empty(stop - start)
        for index in range(start // block, -(-stop // block)):
            first, last = max(start, index * block), min(stop, (index + 1) * block)
            part = whole if whole.is_contiguous() else whole[index]
            values[first - start : last - start] = part.reshape(-1)[first - index * block : last - index * block]
        return values

    def close(self) -> None:
        self._mapped = ("", torch.empty(0))

    def _map(self, stored: str) -> Tensor:
        """Memory-map a stored tensor. Keep the last tensor mapped, because its ranges are read one by one."""
        if self._mapped[0] != stored:
            self._mapped = (stored, self._files.map(stored))
        return self._mapped[1]
