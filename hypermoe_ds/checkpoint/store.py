"""The folder of a run's checkpoints: which there are, which is newest, and how one appears in it.

RUN_DIR/checkpoints/step_00000100/ is one checkpoint: a folder under such a name is whole, since it is written as
`.step_00000100.partial` and renamed. `latest` beside them names the newest and is written last.
"""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from hypermoe_ds.errors import UserError
from hypermoe_ds.files import delete, sync_folder, write_durably

_LOGGER = logging.getLogger(__name__)
_LATEST = "latest"
_LATEST_BYTES = 100  # more than any name


def step_name(step: int) -> str:
    """Folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a folder in `checkpoints`, or a link to one, oldest first."""
    found = [(path, re.fullmatch(r"step_([0-9]+)", path.name)) for path in checkpoints.glob("step_*")]
    steps = [(path, int(match[1])) for path, match in found if match]
    return sorted(step for path, step in steps if path.name == step_name(step) and path.is_dir())


def named_step(checkpoints: Path) -> int | None:
    """Step of the checkpoint that `latest` names, None if it is missing or names none."""
    with suppress(OSError, ValueError), (checkpoints / _LATEST).open("rb") as file:
        name = file.read(_LATEST_BYTES).decode().strip()
        return next((step for step in saved_steps(checkpoints) if step_name(step) == name), None)
    return None


def latest_step(checkpoints: Path) -> int | None:
    """Step of the checkpoint that `latest` names, else, with a warning, of the newest one; None if there is none.

    Raises:
        UserError: there are only damaged ones, or only a `latest`.
    """
    latest, saved, named = checkpoints / _LATEST, saved_steps(checkpoints), named_step(checkpoints)
    damaged = sorted(path.name for path in checkpoints.glob("step_*.damaged*"))
    if damaged and not saved:
        raise UserError(
            str(checkpoints),
            f"holds damaged checkpoints alone ({', '.join(damaged)})",
            "restore one, or choose another run.dir",
        )
    if named is not None or not os.path.lexists(latest):
        return named if named is not None else max(saved, default=None)
    if not saved:
        raise UserError(str(latest), "names no checkpoint, and there is none", "restore one, or remove this file")
    _LOGGER.warning("warning: %s: names no checkpoint next to it; the newest is %s", latest, step_name(saved[-1]))
    return saved[-1]


def find_checkpoint(checkpoints: Path, step: int | None) -> Path:
    """Folder of the checkpoint of `step`, or of the newest one for None.

    Raises:
        UserError: there is none.
    """
    step = latest_step(checkpoints) if step is None else step
    if step is None:
        raise UserError(str(checkpoints), "holds no checkpoint", "train first, or give another run folder")
    folder = checkpoints / step_name(step)
    if not folder.is_dir():
        known = ", ".join(map(str, saved_steps(checkpoints))) or "none"
        raise UserError(str(folder), "does not exist", f"choose a saved step: {known}")
    return folder


def begin(checkpoints: Path, step: int) -> None:
    """Make an empty folder to write a checkpoint in; what earlier tries have left is removed."""
    remove_unfinished(checkpoints)
    partial_folder(checkpoints, step).mkdir(parents=True)


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return checkpoints / f".{step_name(step)}.partial"


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what was cut off while it was written or removed."""
    for path in checkpoints.glob(".step_*"):
        if re.fullmatch(r"\.step_[0-9]+\.(partial|removed)", path.name):
            delete(path)


def publish(checkpoints: Path, step: int) -> None:
    """Give a checkpoint that is written and durable its name, and name it the newest.

    Another one of the same step, of a run that was taken back to an earlier one, is replaced.
    """
    folder = checkpoints / step_name(step)
    if os.path.lexists(folder):
        _remove(folder)
    partial_folder(checkpoints, step).rename(folder)
    sync_folder(checkpoints)
    name_latest(checkpoints, step)


def name_latest(checkpoints: Path, step: int) -> None:
    """Name the checkpoint to continue from."""
    write_durably(checkpoints / _LATEST, step_name(step) + "\n")


def set_aside(checkpoints: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that it is never taken for one."""
    folder = checkpoints / step_name(step)
    aside = folder.with_suffix(".damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_suffix(f".damaged{number}")
    return folder.rename(aside)


def remove_old(checkpoints: Path, newest: int, keep_last: int, keep_every: int | None) -> None:
    """Keep the last ones up to the newest, and for good those of every `keep_every` steps.

    Of one that is a link, the link is removed. One that cannot be removed is reported and stays.
    """
    upto = [step for step in saved_steps(checkpoints) if step <= newest]
    for step in upto[:-keep_last]:
        if not keep_every or step % keep_every:
            try:
                _remove(checkpoints / step_name(step))
            except OSError as error:
                reason = f"{checkpoints / step_name(step)}: cannot be removed ({error.strerror})"
                _LOGGER.warning("warning: %s; remove it by hand", reason)


def _remove(path: Path) -> None:
    """Under a hidden name first: a checkpoint half removed is none."""
    hidden = path.with_name(f".{path.name}.removed")
    if os.path.lexists(hidden):
        delete(hidden)
    path.rename(hidden)
    delete(hidden)
