"""Write and read the tensors of a checkpoint: each rank writes the ranges it owns; any process can read any range.

A checkpoint has one safetensors file per shard. A shard contains at most one range of each flattened parameter, stored
as `KIND/NAME`, and the manifest lists all ranges. Reading therefore does not depend on how many ranks wrote the
checkpoint or on how the parameters were partitioned.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hypermoe_ds.checkpoint.manifest import FileEntry, Manifest, SliceEntry, TensorEntry, Verify, file_entry, shard_name
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import sync_folder

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
_REMEDY = "choose another checkpoint"


def write_shard(folder: Path, shard: int, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write one shard and sync it to disk.

    Args:
        folder: the checkpoint folder.
        shard: index of the shard.
        tensors: contiguous CPU tensors by `KIND/NAME`.
    """
    path = folder / shard_name(shard)
    save_file(dict(tensors), path)
    # safetensors makes the file private to the user; use the permissions of other new files instead.
    path.chmod(0o666 & folder.stat().st_mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_entry(path)


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    settings: dict[str, Any],
    state: dict[str, Any],
    shard_bytes: int,
) -> None:
    """Write a weights-only checkpoint of step 0, shard by shard, in one process.

    Args:
        folder: an empty folder.
        weights: full parameters by their names in the training model; written in fp32.
        settings: the recipe.
        state: training state.
        shard_bytes: maximum size in bytes of a shard with more than one parameter.
    """
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, FileEntry] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        if shard:
            files[shard_name(len(files))] = write_shard(folder, len(files), shard)
            shard.clear()

    for name, tensor in weights:
        if shard and sum(part.nbytes for part in shard.values()) + 4 * tensor.numel() > shard_bytes:
            flush()
        tensors[name] = TensorEntry(tuple(tensor.shape), (SliceEntry(len(files), 0, tensor.numel()),))
        shard[f"{WEIGHT}/{name}"] = tensor.detach().to(torch.float32).flatten().contiguous()
    flush()
    Manifest(0, state, settings, tensors, (WEIGHT,), files).write(folder)
    sync_folder(folder)


def check_shards(folder: Path, manifest: Manifest, verify: Verify, among: Collection[str] | None = None) -> None:
    """Compare a checkpoint's files with its manifest: sizes, headers and, with `verify` "full", hashes.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        verify: what to compare.
        among: names of the files to check; None checks all.

    Raises:
        UserError: a file is missing or differs; the error names the first such file.
        OSError: the disk fails.
    """
    manifest.check_files(folder, verify, among)
    for file_name, held in manifest.shards(among).items():
        path = folder / file_name
        try:
            with safe_open(path, "pt") as file:
                found = set(file.keys())
                for name, numel in held.items():
                    part = file.get_slice(name) if name in found else None
                    if part is None or (part.get_dtype(), part.get_shape()) != ("F32", [numel]):
                        raise UserError(str(path), f"does not have {name} as [{numel}] in fp32", _REMEDY)
        except SafetensorError as error:
            raise UserError(str(path), f"has a damaged header ({error})", _REMEDY) from None


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with NaN or Inf, or None. Each tensor is read once and not copied."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            least, most = tensor.aminmax()  # both are NaN if any element is NaN
            if not (least.isfinite() and most.isfinite()):
                return name
    return None


class CheckpointReader:
    """Read ranges of a checkpoint on demand. The reader is a context manager, because it keeps files open.

    Args:
        folder: the checkpoint.
        verify: what `check_shards` compares before any tensor is read; None skips the check.

    Attributes:
        folder: the checkpoint.
        manifest: its manifest.

    Raises:
        UserError: a file is missing or differs from the manifest.
    """

    def __init__(self, folder: Path, verify: Verify | None = "full") -> None:
        self.manifest = Manifest.read(folder)
        if verify is not None:
            check_shards(folder, self.manifest, verify)
        self.folder = folder
        self._open = ExitStack()
        self._shards: dict[int, Any] = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Close the files and unmap their memory; the next read opens them again."""
        self._shards.clear()
        self._open.close()

    def read(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Read a full parameter, or one of its moments, in fp32."""
        entry = self.manifest.tensors[name]
        return self.read_range(name, 0, entry.numel, kind).view(entry.shape)

    def read_range(self, name: str, start: int, stop: int, kind: str = WEIGHT) -> Tensor:
        """Read elements `start` to `stop` of a flattened parameter, or of one of its moments, in fp32; [stop - start].

        Raises:
            ValueError: the range is out of bounds.
        """
        if not 0 <= start <= stop <= self.manifest.tensors[name].numel:
            raise ValueError(f"{name} of {self.manifest.tensors[name].shape} has no range {start} to {stop}")
        values = torch.empty(stop - start)  # filled completely: the manifest's ranges cover every parameter
        for piece in self.manifest.tensors[name].pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if first < last:
                stored = self._shard(piece.shard).get_slice(f"{kind}/{name}")
                values[first - start : last - start] = stored[first - piece.start : last - piece.start]
        return values

    def first_not_finite(self, among: Collection[str]) -> str | None:
        """Return the `KIND/NAME` of the first tensor with NaN or Inf in the files `among`, or None."""
        for file_name, held in self.manifest.shards(among).items():
            with safe_open(self.folder / file_name, "pt") as file:
                if (name := first_not_finite((name, file.get_tensor(name)) for name in held)) is not None:
                    return name
        return None

    def extra_tensor(self, shard: int, name: str) -> Tensor | None:
        """Read a tensor that is not a parameter, such as a rank's random state; return None if it is missing."""
        if shard_name(shard) not in self.manifest.files:
            return None
        file = self._shard(shard)
        tensor: Tensor | None = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (no dict)
        return tensor

    def _shard(self, shard: int) -> Any:
        if shard not in self._shards:
            self._shards[shard] = self._open.enter_context(safe_open(self.folder / shard_name(shard), "pt"))
        return self._shards[shard]
