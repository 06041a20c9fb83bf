"""Read and write the manifest of a checkpoint, which lists all tensors and files of the checkpoint.

A manifest may come from an untrusted source. Before memory is allocated, its numbers are checked for consistency and
its file sizes are compared with the files.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from hypermoe_ds.errors import UserError
from hypermoe_ds.files import sha256_of, write_durably
from hypermoe_ds.provenance import versions_now

Verify = Literal["sizes", "full"]

MANIFEST = "manifest.json"
FORMAT = 1
BYTES_OF_ELEMENT = 4  # fp32
_LARGEST_MANIFEST = 2**30  # bytes; a manifest of 1,000 tensors in 1,000 shards is 0.1 GiB
_HASHING_THREADS = 8
_REMEDY = "choose another checkpoint"


Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=1000)]
FileName = Annotated[str, Field(strict=True, pattern=r"^shard_[0-9]{5,9}\.safetensors$")]
Digest = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"shard_{shard:05d}.safetensors"


class SliceEntry(NamedTuple):
    """A range of a flattened tensor.

    Attributes:
        shard: index of the file that contains the range.
        start: offset in the flattened tensor.
        numel: number of elements.
    """

    shard: Count
    start: Count
    numel: Count


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor in the shards.

    Attributes:
        shape: shape of the full tensor.
        pieces: ranges that cover the tensor, in order.
    """

    shape: tuple[Count, ...]
    pieces: tuple[SliceEntry, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the full tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of a file.

    Attributes:
        bytes: size of the file.
        sha256: SHA-256 of its content, in hexadecimal.
    """

    bytes: Count
    sha256: Digest


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    Attributes:
        step: optimizer steps taken.
        state: state of the run, the engine and the schedule, as JSON.
        settings: the resolved recipe.
        tensors: parameters by their names in the training model.
        kinds: what is stored for each parameter: "weight" and, after the first step, the optimizer's moments.
        files: all files of the checkpoint except the manifest.
        written_by: git commit and package versions.
    """

    step: Count
    state: dict[str, Any]
    settings: dict[str, Any]
    tensors: dict[Name, TensorEntry]
    kinds: tuple[Name, ...]
    files: dict[FileName, FileEntry]
    written_by: dict[str, str] = field(default_factory=versions_now)

    def write(self, folder: Path) -> None:
        """Write the manifest to the folder and sync it to disk."""
        content = {"format": FORMAT, **asdict(self)}
        # Convert to JSON and back, so that the digest covers the values that a reader gets.
        text = json.dumps({**content, "digest": _digest(json.loads(json.dumps(content)))}, indent=1)
        write_durably(folder / MANIFEST, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a manifest and check its digest, types and consistency.

        Raises:
            UserError: the manifest is missing, damaged, inconsistent or in another format.
        """
        path = folder / MANIFEST
        try:
            check_inside(path, folder)
            if path.stat().st_size > _LARGEST_MANIFEST:
                raise ValueError
            content = from_json(path.read_bytes())  # limits the nesting depth
            damaged = content.pop("digest") != _digest(content)
            of_this_format = content.pop("format") == FORMAT
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            damaged = True
        if damaged:
            raise UserError(str(path), "is missing or damaged", _REMEDY)
        if not of_this_format:
            raise UserError(str(path), "has another format", "read it with the version that wrote it")
        try:
            if content.keys() != {own.name for own in fields(cls)}:
                raise ValueError("it has unknown or missing keys")
            manifest = _MANIFEST.validate_python(content)
            manifest._check_parts()
        except ValueError as error:
            raise UserError(str(path), f"is not valid ({_first_line(error)})", _REMEDY) from None
        return manifest

    def shards(self, among: Collection[str] | None = None) -> dict[str, dict[str, int]]:
        """Return, for each file, the number of elements of each `KIND/NAME` in it.

        Args:
            among: names of the files to include; None includes all.
        """
        found: dict[str, dict[str, int]] = {name: {} for name in self.files if among is None or name in among}
        for name, entry in self.tensors.items():
            for piece in entry.pieces:
                if (held := found.get(shard_name(piece.shard))) is not None:
                    held.update({f"{kind}/{name}": piece.numel for kind in self.kinds})
        return found

    def _check_parts(self) -> None:
        """Check that shapes, ranges and sizes are consistent.

        Raises:
            ValueError: a shape, range or size is inconsistent.
        """
        if len(set(self.kinds)) < len(self.kinds) or "weight" not in self.kinds:
            raise ValueError(f"its kinds are {self.kinds}")
        if not all(isinstance(self.state.get(part, {}), dict) for part in ("run", "engine", "model")):
            raise ValueError("a part of its state is not an object")
        needed: Counter[str] = Counter()
        for name, entry in self.tensors.items():
            ends = [0, *(piece.start + piece.numel for piece in entry.pieces)]
            whole = ends[:-1] == [piece.start for piece in entry.pieces] and ends[-1] == entry.numel
            if not whole or len({piece.shard for piece in entry.pieces}) < len(entry.pieces):
                raise ValueError(f"the ranges of {name!r} do not cover its shape")
            for piece in entry.pieces:
                needed[shard_name(piece.shard)] += BYTES_OF_ELEMENT * len(self.kinds) * piece.numel
        for file, size in needed.items():
            if file not in self.files or size > self.files[file].bytes:
                raise ValueError(f"{file} is smaller than the {size} bytes of its ranges")

    def check_files(self, folder: Path, verify: Verify, among: Collection[str] | None = None) -> None:
        """Compare files with the manifest.

        Args:
            folder: the checkpoint.
            verify: "sizes" compares sizes; "full" also compares hashes.
            among: names of the files to check; None checks all.

        Raises:
            UserError: a file is missing, differs or is a symbolic link out of the folder; the error names the first
                such file.
            OSError: the disk fails.
        """
        chosen = {folder / name: entry for name, entry in self.files.items() if among is None or name in among}
        for path, entry in chosen.items():
            check_inside(path, folder)
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise UserError(str(path), "is missing", _REMEDY)
            if found != entry.bytes:
                raise UserError(str(path), f"has {found} bytes instead of {entry.bytes}", _REMEDY)
        if verify != "full":
            return
        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            for (path, entry), digest in zip(chosen.items(), threads.map(sha256_of, chosen), strict=True):
                if digest != entry.sha256:
                    raise UserError(str(path), "has changed since it was written (its hash differs)", _REMEDY)


_MANIFEST = TypeAdapter(Manifest)


def _first_line(error: ValueError) -> str:
    """Return the location and the problem of the first error, without the value, which may be long."""
    if not isinstance(error, ValidationError):
        return str(error)[:200]
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a symbolic link that leads out of the folder.

    Raises:
        UserError: the path is such a link.
    """
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(str(path), "is a link that leads out of its folder", "replace the link with a copy of the file")


def file_entry(path: Path) -> FileEntry:
    """Return the size and hash of a file."""
    return FileEntry(path.stat().st_size, sha256_of(path))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
