"""The folder of a run's checkpoints: which there are, which is newest, and how one appears in it.

RUN_DIR/checkpoints/step_00000100/ is one checkpoint: a folder under such a name is whole, since it is written as
`.step_00000100.partial` and renamed. `latest` beside them names the newest and is written last.
"""

import re
import shutil
from pathlib import Path

from hypermoe_ds.checkpoint.manifest import sync_folder, write_durably
from hypermoe_ds.errors import UserError

_LATEST = "latest"


def step_name(step: int) -> str:
    """Folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a folder in `checkpoints`, oldest first."""
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in checkpoints.glob("step_*")]
    return sorted(int(match[1]) for match in found if match)


def latest_step(checkpoints: Path) -> int | None:
    """Step of the newest checkpoint, None if there is none.

    Raises:
        UserError: `latest` names none, or there are damaged ones alone.
    """
    latest, saved = checkpoints / _LATEST, saved_steps(checkpoints)
    damaged = sorted(path.name for path in checkpoints.glob("step_*.damaged*"))
    if damaged and not saved:
        raise UserError(
            str(checkpoints),
            f"holds damaged checkpoints alone ({', '.join(damaged)})",
            "restore one, or choose another run.dir",
        )
    if not latest.exists():
        return saved[-1] if saved else None
    match = re.fullmatch(r"step_(\d+)", latest.read_text().strip())
    if match is None or not (checkpoints / match[0]).is_dir():
        known = ", ".join(map(step_name, saved)) or "there is none: remove it"
        raise UserError(str(latest), "names no checkpoint beside it", f"write the name of one into it ({known})")
    return int(match[1])


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
        shutil.rmtree(path)


def publish(checkpoints: Path, step: int) -> None:
    """Give a checkpoint that is written and durable its name, and name it the newest.

    Another one of the same step, of a run that was taken back to an earlier one, is replaced.
    """
    folder = checkpoints / step_name(step)
    if folder.exists():
        _remove(folder)
    partial_folder(checkpoints, step).rename(folder)
    sync_folder(checkpoints)
    name_latest(checkpoints, step)


def name_latest(checkpoints: Path, step: int) -> None:
    """Name the checkpoint to go on from."""
    write_durably(checkpoints / _LATEST, step_name(step) + "\n")


def set_aside(checkpoints: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that it is never taken for one."""
    folder = checkpoints / step_name(step)
    aside = folder.with_suffix(".damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_suffix(f".damaged{number}")
    return folder.rename(aside)


def remove_old(checkpoints: Path, newest: int, keep_last: int, keep_every: int | None) -> None:
    """Keep the last ones up to the newest, and for good those of every `keep_every` steps."""
    upto = [step for step in saved_steps(checkpoints) if step <= newest]
    for step in upto[:-keep_last]:
        if not keep_every or step % keep_every:
            _remove(checkpoints / step_name(step))


def _remove(folder: Path) -> None:
    """Under a hidden name first: a checkpoint half removed is none."""
    hidden = folder.with_name(f".{folder.name}.removed")
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden)
