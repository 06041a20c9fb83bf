"""Small files that others read while they are written anew."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Put `text` in the place of a file at once: who reads it sees all of the old or all of the new.

    Raises:
        OSError: the disk is full or gone.
    """
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
