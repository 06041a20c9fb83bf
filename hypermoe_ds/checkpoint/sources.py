"""The parameters of any folder that holds a model, read range by range under the training model's names.

So a run's checkpoint and a Hugging Face folder can be compared, and neither has to fit into memory.

Shape legend: N experts, F expert width, D hidden size.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypermoe_ds.checkpoint.hf_folder import FolderTensors, read_config
from hypermoe_ds.checkpoint.manifest import MANIFEST
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import WEIGHT, CheckpointReader
from hypermoe_ds.checkpoint.store import find_checkpoint
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig

Shape = tuple[int, ...]

_ELEMENTS_AT_ONCE = 2**20  # 4 MiB in fp32


@dataclass(frozen=True)
class Origin:
    """What a folder is and who wrote it.

    Attributes:
        path: the folder that holds the tensors.
        kind: "run folder", "checkpoint folder" or "Hugging Face folder".
        step: optimizer steps taken; None where the folder does not say.
        files: bytes of each file that holds tensors.
        cut_tensors: tensors of which more than one file holds a part.
        dtypes: types that are stored.
        written_by: git commit and versions of packages, as far as the folder says.
        state: position of the run.
    """

    path: str
    kind: str
    step: int | None
    files: dict[str, int]
    cut_tensors: int
    dtypes: tuple[str, ...]
    written_by: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class Source(ABC):
    """Parameters of one folder; a context manager, since it keeps files open.

    Attributes:
        origin: what the folder is.
        shapes: shape of every parameter, by the training model's names.
        kinds: what there is of each: "weight" and, of a run that has trained, the optimizer's moments.
    """

    origin: Origin
    shapes: dict[str, Shape]
    kinds: tuple[str, ...]

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int, kind: str = WEIGHT) -> Tensor:
        """Elements `start` to `stop` of a flattened parameter, or moment of one, in fp32; [stop - start]."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def open_source(path: Path, step: int | None = None) -> Source:
    """Open a run folder, a checkpoint folder or a Hugging Face folder.

    Args:
        path: the folder.
        step: which checkpoint of a run folder; None takes the newest. Other folders have only one.

    Raises:
        UserError: it is none of these, or not whole, or has no such step.
    """
    run = RunFolder(path)
    if run.exists():
        return CheckpointSource(find_checkpoint(run.checkpoints, step), "run folder")
    if (path / MANIFEST).is_file():
        return CheckpointSource(path, "checkpoint folder")
    if (path / "config.json").is_file():
        return HuggingFaceSource(path)
    raise UserError(str(path), "is no run folder, checkpoint folder or Hugging Face folder", "give one of them")


def check_step(step: int | None, paths: Iterable[Path]) -> None:
    """Refuse a step that no folder could have.

    Raises:
        UserError: there is a step, and none of the folders is a run's.
    """
    if step is not None and not any(RunFolder(path).exists() for path in paths):
        raise UserError(f"--step={step}", "only a run folder has steps and none is given", "leave it out")


def ranges(elements: int, at_once: int = _ELEMENTS_AT_ONCE) -> Iterator[tuple[int, int]]:
    """Cut `elements` into (start, stop) of at most `at_once`."""
    for start in range(0, elements, at_once):
        yield start, min(start + at_once, elements)


class CheckpointSource(Source):
    """A checkpoint of a run.

    Args:
        folder: the checkpoint.
        kind: what the user named: a run folder or the checkpoint itself.

    Raises:
        UserError: a file is missing or differs from what was written.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._reader = CheckpointReader(folder)
        manifest = self._reader.manifest
        self.shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
        self.kinds = manifest.kinds
        self.origin = Origin(
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


class _View(NamedTuple):
    """A parameter as rows of a stored tensor: element i is at offset + (i // block) * stride + i % block.

    Attributes:
        stored: name of the tensor in the files.
        shape: shape of the parameter.
        offset: of its first element in the stored tensor.
        block: elements that lie together.
        stride: elements from one block to the next.
    """

    stored: str
    shape: Shape
    offset: int
    block: int
    stride: int


class HuggingFaceSource(Source):
    """A Hugging Face folder of safetensors files; the experts of a HyperMoE model are named as in training.

    Args:
        folder: the folder.

    Raises:
        UserError: a file is missing or damaged.
    """

    kinds = (WEIGHT,)

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        tensors = FolderTensors(folder)
        self._open = ExitStack()
        self._path_of = tensors.path_of
        self._files: dict[Path, Any] = {}
        joined = config.get("model_type") == HyperMoEConfig.model_type
        self._views = {name: view for stored in tensors.shapes.items() for name, view in _views(*stored, joined)}
        self.shapes = {name: view.shape for name, view in self._views.items()}
        version = config.get("transformers_version")
        self.origin = Origin(
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
        view = self._views[name]
        stored = self._stored(view.stored)
        values = torch.empty(stop - start)
        position = start
        while position < stop:
            row, inside = divmod(position, view.block)
            length = min(stop - position, view.block - inside)
            first = view.offset + row * view.stride + inside
            values[position - start : position - start + length] = stored[first : first + length]
            position += length
        return values

    def close(self) -> None:
        self._files.clear()
        self._open.close()

    def _stored(self, name: str) -> Tensor:
        """A tensor of a file, flattened and mapped to it: only what is read of it is fetched."""
        path = self._path_of(name)
        try:
            if path not in self._files:
                self._files[path] = self._open.enter_context(safe_open(path, "pt"))
            stored: Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: {name}", f"cannot be read ({error})", "export or fetch the folder again"
            ) from None
        return stored.view(-1)


def _views(stored: str, shape: Shape, joined: bool) -> Iterator[tuple[str, _View]]:
    """The training model's parameters that lie in a stored tensor: one, or both halves of gate_up_proj [N, 2F, D]."""
    match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", stored) if joined else None
    if match is None or match[2] == "down_proj" or len(shape) != 3 or shape[1] % 2:
        name = f"{match[1]}.w2" if match is not None and match[2] == "down_proj" else stored
        yield name, _View(stored, shape, 0, max(prod(shape), 1), 0)
        return
    N, F, D = shape[0], shape[1] // 2, shape[2]
    for name, offset in (("w1", 0), ("w3", F * D)):
        yield f"{match[1]}.{name}", _View(stored, (N, F, D), offset, F * D, 2 * F * D)
