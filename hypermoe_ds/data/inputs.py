"""Find the input files of a preprocessing job, and derive each file's kind and compression from its name."""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hypermoe_ds.errors import UserError

_GLOB_CHARACTERS = frozenset("*?[")


class Kind(StrEnum):
    """How the documents of a file are stored."""

    TEXT = "text"
    JSON_LINES = "jsonl"
    PARQUET = "parquet"
    ARROW = "arrow"


_PROSE = "adoc markdown md org rst tex txt"
_CODE = (
    "asm bash bat c cc clj cmake cpp cs css cu cuh cxx dart el erl ex exs f f90 fs go h hh hpp hs htm html ipp java jl "
    "js jsx kt kts lisp lua m ml mli mm nim php pl pm proto ps1 py pyi pyx r rb rs s sass scala scm scss sh sql swift "
    "tcl ts tsx v vb vhd vue xml yaml yml zig zsh"
)
_KINDS = {
    **{f".{suffix}": Kind.TEXT for suffix in (*_PROSE.split(), *_CODE.split())},
    **{f".{suffix}": Kind.JSON_LINES for suffix in ("json", "jsonl", "ndjson")},
    ".parquet": Kind.PARQUET,
    ".arrow": Kind.ARROW,
}
COMPRESSIONS = (".bz2", ".gz", ".xz", ".zst")
READABLE_KINDS = (
    "text (.txt, .md, source code), JSON Lines (.jsonl, .ndjson, .json), both also compressed (.gz, .zst, .xz, .bz2), "
    "Parquet (.parquet) and folders of the datasets library"
)


@dataclass(frozen=True)
class InputFile:
    """An input file.

    Attributes:
        path: path of the file.
        kind: how its documents are stored.
        compression: `.bz2`, `.gz`, `.xz`, `.zst`, or an empty string for an uncompressed file.
        size: size in bytes.
        modified_ns: modification time in nanoseconds since 1970.
    """

    path: Path
    kind: Kind
    compression: str
    size: int
    modified_ns: int


def find_inputs(inputs: Iterable[str | Path], unknown_as: Kind | None = None) -> list[InputFile]:
    """Return all input files in order, after checking that each file can be opened.

    A folder stands for the files in it and in its subfolders, sorted by path. Symbolic links are followed, and each
    folder is read once. Hidden files and folders inside a folder are skipped. In a folder that the datasets library
    saved, only the data files are read.

    Args:
        inputs: files and folders.
        unknown_as: kind to assume for files with an unknown suffix; with None, such files are an error.

    Raises:
        UserError: an input does not exist, is a pattern without matches, is a folder without files, has an unknown
            suffix, or cannot be read.
    """
    found = [_input_file(path, unknown_as) for each in map(Path, inputs) for path in _expand(each)]
    _check_readable(found)
    return found


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        inside = sorted(_walk(path, set()))
        if not inside:
            raise UserError(str(path), "is a folder without files", "give files, or a folder with files")
        return inside
    if path.exists():
        return [path]
    if _GLOB_CHARACTERS & set(str(path)):
        raise UserError(str(path), "the pattern matches no file", "check the folder and the pattern")
    raise UserError(str(path), "no such file", "check the path")


def _walk(folder: Path, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the visible files in a folder and its subfolders, but skip folders that were visited before."""
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        problem = f"cannot be listed ({error.strerror})"
        raise UserError(str(folder), problem, "change its permissions, or give the other folders as inputs") from None
    if "dataset_dict.json" in names:
        remedy = "give the folder of one split, such as train"
        raise UserError(str(folder), "is a datasets folder with several splits", remedy)
    if {"state.json", "dataset_info.json"} <= set(names):
        yield from _datasets_files(folder)
        return
    for name in names:
        if (folder / name).is_dir():
            yield from _walk(folder / name, visited)
        else:
            yield folder / name


def _datasets_files(folder: Path) -> list[Path]:
    """Return the data files of a folder that `Dataset.save_to_disk` wrote, without its caches and metadata."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / each["filename"] for each in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"does not list the data files of a datasets folder ({error})"
        raise UserError(str(folder / "state.json"), problem, "save the dataset again, or give its files") from None


def _input_file(path: Path, unknown_as: Kind | None) -> InputFile:
    name = path.name.lower()
    compression = next((each for each in COMPRESSIONS if name.endswith(each)), "")
    kind = _KINDS.get(Path(name.removesuffix(compression)).suffix, unknown_as)
    if kind is None:
        remedy = f"give {READABLE_KINDS}, or add --as text to read it as text"
        raise UserError(str(path), "has an unknown suffix", remedy)
    if compression and kind in (Kind.PARQUET, Kind.ARROW):
        raise UserError(str(path), f"is a {kind} file compressed as {compression}", "decompress the file")
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", "check the file") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(str(path), "is not a regular file", "give files that can be read more than once")
    return InputFile(path, kind, compression, status.st_size, status.st_mtime_ns)


def _check_readable(files: list[InputFile]) -> None:
    """Open every file before the job starts, so that a long job does not fail at its last file."""
    errors = []
    for file in files:
        try:
            file.path.open("rb").close()
        except OSError as error:
            errors.append((file.path, error.strerror))
    if errors:
        path, reason = errors[0]
        others = f", and {len(errors) - 1:,} other files" if len(errors) > 1 else ""
        raise UserError(str(path), f"cannot be opened ({reason}){others}", "change the permissions of the files")
