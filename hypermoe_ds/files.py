"""Check and hash files, write them atomically or durably, and create temporary output folders."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hypermoe_ds.errors import UserError

_HASHED_BYTES = 1 << 20


def file_of(folder: Path, name: str) -> Path:
    """Return the path of a file in an untrusted folder.

    A symbolic link may only point to a file inside the folder or, in a snapshot of the Hugging Face cache, to a file in
    the cache's `blobs` folder.

    Args:
        folder: the folder.
        name: name of the file, without a folder.

    Raises:
        UserError: the name or a link points outside the folder, or the path is not a regular file.
    """
    path = folder / name
    if Path(name).name != name:
        raise UserError(str(path), "is not a file in this folder", "fetch or export the folder again")
    try:
        root, target, is_file = folder.resolve(), path.resolve(), path.is_file()
    # A link may point to itself, and a name may be too long or contain a null byte.
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(repr(str(path)), f"cannot be read ({error})", "fetch or export the folder again") from None
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not target.is_relative_to(root) and target.parent != blobs:
        remedy = "replace the link with a copy of the file"
        raise UserError(str(path), f"is a link that leads out of the folder (to {target})", remedy)
    if not is_file:
        raise UserError(str(path), "is missing or not a file", "fetch or export the folder again")
    return path


def distinct_names(paths: Sequence[Sequence[str]], separator: str, numbered: str) -> list[str]:
    """Return a short name for each path: its shortest unique suffix.

    Args:
        paths: parts of each path, such as `Path.parts`.
        separator: separator between the parts of a name.
        numbered: format string for a repeated name, with placeholders for the name and its number.
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


def write_atomically(path: Path, text: str) -> None:
    """Atomically replace the content of a file: readers see either the old or the new content.

    Raises:
        OSError: the file cannot be written.
    """
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Atomically replace the content of a file with lines. `lines` may read from the old content.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    temporary.replace(path)


def write_durably(path: Path, text: str) -> None:
    """Atomically replace the content of a small file and sync the file to disk, so that it survives a power failure."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that new and renamed files survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Args:
        path: the file.
        progress: called with the number of bytes read since the last call.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def check_output(output: Path) -> None:
    """Refuse an output path that is already in use.

    Raises:
        UserError: the output is a file or a folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(str(output), "exists already", "remove it or choose another folder")


def check_input(folder: Path) -> None:
    """Refuse a missing folder early, before large libraries are imported.

    Raises:
        UserError: the path is missing or not a folder.
    """
    if not folder.is_dir():
        raise UserError(str(folder), "is not a folder", "check the path; give the run folder or Hugging Face folder")


def check_room(output: Path, folder: Path, needed: int) -> None:
    """Refuse an output that is larger than the free disk space.

    Args:
        output: path of the output, for the error message.
        folder: an existing folder on the same file system.
        needed: size of the output in bytes.

    Raises:
        UserError: there is too little free space.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            str(output), f"needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free", "free disk space"
        )


def delete(path: Path) -> None:
    """Delete a file, a link (but not its target), or a folder and its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def writing_to(target: Path) -> Iterator[None]:
    """Convert a disk failure to a `UserError` that names `target`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(str(target), f"cannot be written ({reason})", "fix the cause or choose another path") from None


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Create a temporary hidden folder next to `target` and remove it on exit.

    Missing parents of `target` are created. They are removed again if the code inside the context fails.

    Raises:
        UserError: the folder is not writable.
    """
    with writing_to(target):
        made = make_folder(target.parent)
        try:
            with TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as folder:
                yield Path(folder)
        except BaseException:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            raise


def make_folder(folder: Path) -> Path | None:
    """Create a folder and its parents, and return the topmost folder that was missing, if any."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[-1] if missing else None
