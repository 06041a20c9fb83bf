"""Read, check and write files: atomic and durable writes, hashes, temporary output folders."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hypermoe_ds.errors import UserError


def file_of(folder: Path, name: str) -> Path:
    """Find a file that a folder names.

    A link is followed only to a file of the folder or, in a snapshot of the Hugging Face cache, to one of the cache's
    `blobs` beside it.

    Args:
        folder: the folder.
        name: the file's name, without any other folder.

    Raises:
        UserError: the name or a link leads out of the folder, or there is no such regular file.
    """
    path = folder / name
    if Path(name).name != name:
        raise UserError(str(path), "is not a file of this folder", "fetch or export the folder again")
    try:
        root, target, is_file = folder.resolve(), path.resolve(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, too long, a zero byte
        raise UserError(repr(str(path)), f"cannot be read ({error})", "fetch or export the folder again") from None
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not target.is_relative_to(root) and target.parent != blobs:
        raise UserError(str(path), f"is a link that leads out of the folder (to {target})", "copy the file there")
    if not is_file:
        raise UserError(str(path), "is missing or not a file", "fetch or export the folder again")
    return path


def distinct_names(paths: Sequence[Sequence[str]], separator: str, numbered: str) -> list[str]:
    """Return a short name for each path: its shortest end that no other one has.

    Args:
        paths: parts of each path, such as `Path.parts`.
        separator: what joins the parts of a name.
        numbered: format of a name that an earlier path has too, such as the same path twice: name, number.
    """
    ends = [tuple(path)[::-1] for path in paths]
    names = []
    for end in ends:
        lengths = range(1, len(end) + 1)
        length = next((n for n in lengths if sum(other[:n] == end[:n] for other in ends) == 1), 1)
        names.append(separator.join(part.strip("/") for part in end[:length][::-1]))
    return [
        numbered.format(name, names[:i].count(name) + 1) if name in names[:i] else name for i, name in enumerate(names)
    ]


def write_whole(path: Path, text: str) -> None:
    """Put `text` in the place of a file at once: who reads it sees all of the old or all of the new.

    Raises:
        OSError: the disk is full or gone.
    """
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Do the same with lines that are made, or read from the old file, while they are written.

    Raises:
        OSError: the disk is full or gone.
    """
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    beside.replace(path)


def write_durably(path: Path, text: str) -> None:
    """Write a small file whole or not at all, so that it survives a power cut."""
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


def sha256_of(path: Path) -> str:
    """Hash of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(output: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        UserError: it is a file or a folder with something in it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(str(output), "exists already", "remove it or choose another folder")


def check_input(folder: Path) -> None:
    """Refuse a folder that is not there, before what it takes to read it is imported.

    Raises:
        UserError: it is missing or no folder.
    """
    if not folder.is_dir():
        raise UserError(str(folder), "is not a folder", "check the path; give the run folder or Hugging Face folder")


def check_room(output: Path, beside: Path, needed: int) -> None:
    """Refuse to write what the disk cannot hold.

    Args:
        output: what is to be written, for the message.
        beside: a folder that exists on its file system.
        needed: its bytes.

    Raises:
        UserError: less is free.
    """
    free = shutil.disk_usage(beside).free
    if free < needed:
        raise UserError(
            str(output), f"needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} are free", "free some disk"
        )


def delete(path: Path) -> None:
    """Delete a folder with its content, a file, or a link without what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def writing_to(target: Path) -> Iterator[None]:
    """Turn a failure of the disk into a `UserError` that names `target`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(str(target), f"cannot be written ({reason})", "fix that or choose another place") from None


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A new hidden folder on the file system of `target`, removed at the end whatever happens.

    Parents of `target` that are missing are made, and removed again if the body fails.

    Raises:
        UserError: the place cannot be written to.
    """
    with writing_to(target):
        made = _make_parents(target.parent)
        try:
            with TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as folder:
                yield Path(folder)
        except BaseException:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            raise


def _make_parents(folder: Path) -> Path | None:
    """Make `folder`; the topmost folder that was missing, if any."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[-1] if missing else None
