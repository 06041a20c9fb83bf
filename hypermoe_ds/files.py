"""Files of folders that others made, and short names for paths."""

from collections.abc import Sequence
from pathlib import Path

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
