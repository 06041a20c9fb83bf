"""List, publish and remove the checkpoints in the checkpoint directory of a run.

Each checkpoint is a folder such as RUN_DIR/checkpoints/step_00000100/. The folder is written under the name
`.step_00000100.partial` and renamed when it is complete. A file named `latest` contains the name of the newest
checkpoint and is written last.
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
_LATEST_BYTES = 100  # longer than any checkpoint name


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint saved after `step` optimizer steps."""
    return f"step_{step:08d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps of all checkpoints, including symbolic links, in ascending order."""
    found = [(path, re.fullmatch(r"step_([0-9]+)", path.name)) for path in checkpoints.glob("step_*")]
    steps = [(path, int(match[1])) for path, match in found if match]
    return sorted(step for path, step in steps if path.name == step_name(step) and path.is_dir())


def named_step(checkpoints: Path) -> int | None:
    """Return the step of the checkpoint that `latest` names, or None if `latest` is missing or invalid."""
    with suppress(OSError, ValueError), (checkpoints / _LATEST).open("rb") as file:
        name = file.read(_LATEST_BYTES).decode().strip()
        return next((step for step in saved_steps(checkpoints) if step_name(step) == name), None)
    return None


def latest_step(checkpoints: Path) -> int | None:
    """Return the step that `latest` names, or None if there is no checkpoint.

    If `latest` is invalid, log a warning and return the newest step.

    Raises:
        UserError: all checkpoints are damaged, or `latest` exists but there is no checkpoint.
    """
    latest, saved, named = checkpoints / _LATEST, saved_steps(checkpoints), named_step(checkpoints)
    damaged = sorted(path.name for path in checkpoints.glob("step_*.damaged*"))
    if damaged and not saved:
        raise UserError(
            str(checkpoints),
            f"has only damaged checkpoints ({', '.join(damaged)})",
            "restore one, or choose another run.dir",
        )
    if named is not None or not os.path.lexists(latest):
        return named if named is not None else max(saved, default=None)
    if not saved:
        remedy = "restore a checkpoint, or remove this file"
        raise UserError(str(latest), "exists, but there is no checkpoint", remedy)
    newest = step_name(saved[-1])
    _LOGGER.warning("warning: %s: does not name an existing checkpoint; using the newest, %s", latest, newest)
    return saved[-1]


def find_checkpoint(checkpoints: Path, step: int | None) -> Path:
    """Return the checkpoint folder of `step`, or of the newest step if `step` is None.

    Raises:
        UserError: the checkpoint does not exist.
    """
    step = latest_step(checkpoints) if step is None else step
    if step is None:
        raise UserError(str(checkpoints), "has no checkpoint", "train first, or give another run folder")
    folder = checkpoints / step_name(step)
    if not folder.is_dir():
        known = ", ".join(map(str, saved_steps(checkpoints))) or "none"
        raise UserError(str(folder), "does not exist", f"choose a saved step: {known}")
    return folder


def begin(checkpoints: Path, step: int) -> None:
    """Create an empty folder for a new checkpoint, after removing unfinished checkpoints."""
    remove_unfinished(checkpoints)
    partial_folder(checkpoints, step).mkdir(parents=True)


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Return the temporary folder in which a checkpoint is written."""
    return checkpoints / f".{step_name(step)}.partial"


def remove_unfinished(checkpoints: Path) -> None:
    """Delete the remains of interrupted saves and deletions."""
    for path in checkpoints.glob(".step_*"):
        if re.fullmatch(r"\.step_[0-9]+\.(partial|removed)", path.name):
            delete(path)


def publish(checkpoints: Path, step: int) -> None:
    """Rename a checkpoint, which is already synced to disk, to its final name, then update `latest`.

    A checkpoint of the same step, which exists if the run was resumed from an earlier one, is replaced.
    """
    folder = checkpoints / step_name(step)
    if os.path.lexists(folder):
        _remove(folder)
    partial_folder(checkpoints, step).rename(folder)
    sync_folder(checkpoints)
    name_latest(checkpoints, step)


def name_latest(checkpoints: Path, step: int) -> None:
    """Write the file `latest`, which names the checkpoint to resume from."""
    write_durably(checkpoints / _LATEST, step_name(step) + "\n")


def set_aside(checkpoints: Path, step: int) -> Path:
    """Rename a damaged checkpoint so that it is not used again, and return its new path."""
    folder = checkpoints / step_name(step)
    aside = folder.with_suffix(".damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_suffix(f".damaged{number}")
    return folder.rename(aside)


def remove_old(checkpoints: Path, newest: int, keep_last: int, keep_every: int | None) -> None:
    """Delete old checkpoints, except the last `keep_last` and those whose step is a multiple of `keep_every`.

    Checkpoints after step `newest` are not deleted. If a checkpoint is a symbolic link, only the link is deleted. If a
    checkpoint cannot be deleted, log a warning and keep it.
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
    """Delete a checkpoint; rename it first, so that a partly deleted checkpoint is never used."""
    hidden = path.with_name(f".{path.name}.removed")
    if os.path.lexists(hidden):
        delete(hidden)
    path.rename(hidden)
    delete(hidden)
