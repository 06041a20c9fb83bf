"""Outputs appear whole or not at all: they are written in a folder beside their place, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hypermoe_ds.errors import UserError


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
        raise UserError(str(folder), "is no folder", "check the path; give the run folder or Hugging Face folder")


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
        raise UserError(str(target), f"cannot be written ({reason})", "mend that or choose another place") from None


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
