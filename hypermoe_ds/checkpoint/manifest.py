"""What a checkpoint is made of: read, and checked against the files, before anything else of it is read."""

import hashlib
import json
import os
import subprocess
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hypermoe_ds.errors import UserError

Verify = Literal["sizes", "full"]

MANIFEST = "manifest.json"
FORMAT = 1
_PACKAGES = ("hypermoe-ds", "torch", "deepspeed", "transformers")


class Piece(NamedTuple):
    """A range of a flattened tensor.

    Attributes:
        shard: number of the file that holds it.
        start: its first element in the whole tensor.
        numel: its elements.
    """

    shard: int
    start: int
    numel: int


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is.

    Attributes:
        shape: shape of the whole tensor.
        pieces: ranges that together are the tensor, in order.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written.

    Attributes:
        bytes: its size.
        sha256: hash of its content, hexadecimal.
    """

    bytes: int
    sha256: str


def versions_now() -> dict[str, str]:
    """Git commit of the code and versions of the packages that matter."""
    found = {"git_commit": _git_commit()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _git_commit() -> str:
    """Commit of the checkout that this file belongs to, "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint.

    Attributes:
        step: optimizer steps taken.
        state: position of the run and of the schedule, as JSON.
        settings: the recipe as run.
        tensors: parameters by the training model's names.
        kinds: what there is of each: "weight" and, of a run that has trained, the optimizer's moments.
        files: all other files of the folder.
        written_by: git commit and versions of packages.
    """

    step: int
    state: dict[str, Any]
    settings: dict[str, Any]
    tensors: dict[str, TensorEntry]
    kinds: tuple[str, ...]
    files: dict[str, FileEntry]
    written_by: dict[str, str] = field(default_factory=versions_now)

    def write(self, folder: Path) -> None:
        """Write it into the folder, durably."""
        content = {"format": FORMAT, **asdict(self)}
        # Through JSON once, so that the digest is of what a reader will see.
        text = json.dumps({**content, "digest": _digest(json.loads(json.dumps(content)))}, indent=1)
        write_durably(folder / MANIFEST, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read it and check its digest.

        Raises:
            UserError: there is none, or it is damaged or of another format.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            damaged = content.pop("digest") != _digest(content)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            damaged = True
        if damaged:
            raise UserError(str(path), "is missing or damaged", "choose another checkpoint")
        if content.pop("format") != FORMAT:
            raise UserError(str(path), "is of another format", "read it with the version that wrote it")
        content["tensors"] = {
            name: TensorEntry(tuple(entry["shape"]), tuple(Piece(*piece) for piece in entry["pieces"]))
            for name, entry in content["tensors"].items()
        }
        content["files"] = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        return cls(**{**content, "kinds": tuple(content["kinds"])})

    def check_files(self, folder: Path, verify: Verify, among: Collection[str] | None = None) -> None:
        """Compare files with what was written.

        Args:
            folder: the checkpoint.
            verify: "sizes" compares sizes, "full" hashes too.
            among: names of the files to look at; None takes all.

        Raises:
            UserError: one is missing or differs; the first is named.
        """
        for name, entry in self.files.items():
            if among is not None and name not in among:
                continue
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise UserError(str(path), "is missing", "choose another checkpoint")
            if found != entry.bytes:
                raise UserError(
                    str(path), f"has {found} bytes and was written with {entry.bytes}", "choose another checkpoint"
                )
            if verify == "full" and sha256_of(path) != entry.sha256:
                raise UserError(str(path), "is not what was written (its hash differs)", "choose another checkpoint")


def sha256_of(path: Path) -> str:
    """Hash of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file."""
    return FileEntry(path.stat().st_size, sha256_of(path))


def write_durably(path: Path, text: str) -> None:
    """Write a small file whole or not at all, so that it outlives a power cut."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
