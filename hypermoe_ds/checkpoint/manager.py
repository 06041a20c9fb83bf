"""Saves and loads a run's checkpoints through DeepSpeed, and keeps the last of them.

RUN_DIR/checkpoints/step_00000100/ is one checkpoint; `latest` beside them names the newest whole
one and is written last.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch.distributed
from pydantic import Field

from hypermoe_ds.config import Settings
from hypermoe_ds.errors import UserError

_BYTES_OF_STATE = 12  # of a parameter: fp32 weight and two moments


class CheckpointConfig(Settings):
    """When checkpoints are written and which are kept."""

    interval: int = Field(1000, ge=1, description="steps between two checkpoints; one more is written at the end")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that are kept")
    resume: Literal["auto", "none"] = Field("auto", description="continue from the newest checkpoint, if there is one")


def step_name(step: int) -> str:
    """Folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a folder in `checkpoints`, oldest first."""
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in checkpoints.glob("step_*")]
    return sorted(int(match[1]) for match in found if match)


def latest_step(checkpoints: Path) -> int | None:
    """Step of the newest whole checkpoint, None if there is none."""
    latest = checkpoints / "latest"
    if not latest.exists():
        return None
    match = re.fullmatch(r"step_(\d+)", latest.read_text().strip())
    if match is None or not (checkpoints / match[0]).is_dir():
        raise UserError(str(latest), "names no checkpoint beside it", "write the name of a step_ folder into it")
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


class CheckpointManager:
    """Checkpoints of one run.

    Args:
        engine: the DeepSpeed engine to save and load.
        checkpoints: RUN_DIR/checkpoints.
        config: when to save and what to keep.
        parameters: parameters of the model, for the disk check.
    """

    def __init__(self, engine: Any, checkpoints: Path, config: CheckpointConfig, parameters: int) -> None:
        self._engine = engine
        self._folder = checkpoints
        self._config = config
        bytes_of_weight = torch.finfo(next(engine.module.parameters()).dtype).bits // 8
        self._size = parameters * (_BYTES_OF_STATE + bytes_of_weight)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        return step % self._config.interval == 0

    def resume(self) -> dict[str, Any] | None:
        """Load the newest checkpoint (collective).

        Returns:
            The state saved with it, None if there is none.

        Raises:
            UserError: there are checkpoints and `checkpoint.resume` is "none".
        """
        step = latest_step(self._folder)
        if step is None:
            return None
        if self._config.resume == "none":
            raise UserError(
                str(self._folder), "holds checkpoints", "choose another run.dir or set checkpoint.resume=auto"
            )
        _, state = self._engine.load_checkpoint(str(self._folder), tag=step_name(step))
        return dict(state)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint after `step` (collective), then remove the oldest beyond `keep_last`.

        Raises:
            UserError: the disk has no room for it.
        """
        self.check_room()
        self._engine.save_checkpoint(str(self._folder), tag=step_name(step), client_state=state)
        if torch.distributed.get_rank() == 0:
            self._remove_old(step)
        torch.distributed.barrier()

    def check_room(self) -> None:
        """Refuse to start a checkpoint that the disk cannot hold (collective). Writes nothing.

        Raises:
            UserError: less is free than a checkpoint takes, or the folder cannot be written to.
        """
        place = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UserError(f"run.dir={self._folder.parent}", "cannot be written to", "choose another run.dir")
        # The least over the ranks, taken before any of them writes: all go on, or none does.
        least = torch.tensor(shutil.disk_usage(place).free, device=self._engine.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        free = int(least)
        if free < self._size:
            raise UserError(
                str(self._folder),
                f"{free / 2**30:.2f} GiB are free and a checkpoint takes {self._size / 2**30:.2f} GiB",
                "free some disk or choose another run.dir",
            )

    def _remove_old(self, newest: int) -> None:
        """Keep the newest ones; one of a later step was cut off while it was written, before a resume."""
        steps = saved_steps(self._folder)
        whole = [step for step in steps if step <= newest]
        for step in {*steps} - {*whole[-self._config.keep_last :]}:
            shutil.rmtree(self._folder / step_name(step))
