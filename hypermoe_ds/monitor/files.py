"""Small files that others read while they are written anew."""

from collections.abc import Iterable
from pathlib import Path


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
