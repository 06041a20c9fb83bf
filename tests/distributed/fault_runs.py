"""Code that ranks run in the checkpoint fault tests: save checkpoints of a small replacement for the engine's state."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from hypermoe_ds.checkpoint import manager
from hypermoe_ds.checkpoint.directory import step_name
from hypermoe_ds.checkpoint.engine_state import LocalSlice
from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.checkpoint.manifest import shard_name
from hypermoe_ds.checkpoint.settings import CheckpointConfig
from hypermoe_ds.checkpoint.shards import MOMENTS, WEIGHT
from hypermoe_ds.errors import MachineError, UserError

NUMEL = 200_000


class Part:
    """Stand-in for `EngineState` that holds this rank's part of one parameter.

    All its values equal the number of the step.
    """

    device = torch.device("cpu")

    def __init__(self, _engine: Any) -> None:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.values = torch.zeros(NUMEL)
        self.slices = {"weight": LocalSlice((ranks * NUMEL,), rank * NUMEL, NUMEL)}

    def tensors(self) -> Any:
        for kind in (WEIGHT, *MOMENTS):
            yield f"{kind}/weight", self.values

    def model(self) -> dict[str, Any]:
        return {"hidden_size": 8}

    def counters(self) -> dict[str, Any]:
        names = ("optimizer_steps", "schedule_steps", "global_steps", "global_samples", "skipped_steps")
        return {**dict.fromkeys(names, 1), "loss_scaler": {}}

    def load(self, reader: Any, _counters: Any) -> None:
        _, start, numel = self.slices["weight"]
        self.values.copy_(reader.read_range("weight", start, start + numel))


def manager_of(folder: Path, **config: Any) -> tuple[CheckpointManager, Part]:
    """Build a checkpoint manager that saves a `Part`."""
    manager.EngineState = Part  # type: ignore[assignment,misc] (only affects this test process)
    checkpoints = CheckpointManager(Part(None), folder / "checkpoints", CheckpointConfig(**config), {})
    part: Part = checkpoints._state  # type: ignore[assignment]
    return checkpoints, part


def save_without_end(folder: Path, asynchronous: bool) -> None:
    """Resume, then save a checkpoint in every step until the process is killed.

    Each rank appends the number of each completed save to its own file.
    """
    checkpoints, part = manager_of(folder, asynchronous=asynchronous, verify="full")
    state = checkpoints.resume()
    step = 0 if state is None else state["step"]
    assert bool((part.values == step).all())
    with (folder / f"saved_by_{torch.distributed.get_rank()}").open("a") as notes:
        while True:
            step += 1
            part.values.fill_(step)
            checkpoints.save(step, {"step": step})
            if asynchronous:
                checkpoints.finish()
            notes.write(f"{step}\n")
            notes.flush()


def save_steps(
    folder: Path, last: int, config: dict[str, Any], fails_at: int | None = None
) -> tuple[int, str | None, list[str]]:
    """Resume, then save a checkpoint in every step up to `last`. The save in step `fails_at` fails on rank 1.

    Returns:
        The step from which the run resumed, the error message or None, and the log messages.
    """
    checkpoints, part = manager_of(folder, **config)
    write = manager.write_shard

    def write_or_fail(partial: Path, rank: int, tensors: Any) -> Any:
        if rank == 1 and f"{fails_at}.partial" in partial.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(partial, rank, tensors)

    manager.write_shard = write_or_fail
    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    ours = logging.getLogger("hypermoe_ds")
    ours.setLevel(logging.INFO)
    ours.addHandler(listener)
    resumed = 0
    try:
        state = checkpoints.resume()
        resumed = 0 if state is None else state["step"]
        assert bool((part.values == resumed).all())
        for step in range(resumed + 1, last + 1):
            part.values.fill_(step)
            checkpoints.save(step, {"step": step})
        checkpoints.finish()
    except (UserError, MachineError) as error:
        return resumed, str(error), messages
    return resumed, None, messages


def save_not_finite(folder: Path, asynchronous: bool) -> tuple[list[str], str | None]:
    """Save two finite states, then three states with a NaN on rank 1.

    Return the error messages and the last good checkpoint.
    """
    checkpoints, part = manager_of(folder, asynchronous=asynchronous, keep_last=1)
    raised = []
    for step in range(1, 6):
        part.values.fill_(step)
        if step > 2 and torch.distributed.get_rank() == 1:
            part.values[7] = torch.nan
        try:
            checkpoints.save(step, {"step": step})
        except MachineError as error:
            raised.append(str(error))
    good = checkpoints.last_good()
    return raised, good and good.name


def save_in_bad_steps(folder: Path, damage: Callable[[Path], None]) -> list[str | None]:
    """Save checkpoints of good steps 1 to 3 and bad steps 4 and 5, then damage four of them.

    The checkpoints are damaged in the order 5, 3, 2, 1. Return the last good checkpoint after each one is damaged.
    """
    checkpoints, part = manager_of(folder, keep_last=1, asynchronous=False, verify="sizes")
    for step in range(1, 6):
        part.values.fill_(step)
        checkpoints.save(step, {"step": step, "bad_steps": max(0, step - 3)}, prune=False)
    found = []
    for step in (5, 3, 2, 1):
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            damage(folder / "checkpoints" / step_name(step) / shard_name(1))
        torch.distributed.barrier()
        good = checkpoints.last_good()
        found.append(good and good.name)
    return found


def save_on_full_disk(folder: Path) -> list[str]:
    """Save until the disk is full, then free space and save once more.

    A fake measurement always reports enough free disk space, so that the saves start.
    """
    manager.shutil.disk_usage = lambda _: _Plenty  # type: ignore[attr-defined]
    checkpoints, part = manager_of(folder, asynchronous=False, keep_last=9)
    errors = []
    for step in range(1, 9):
        part.values.fill_(step)
        try:
            checkpoints.save(step, {"step": step})
        except MachineError as error:
            errors.append(str(error))
            break
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / "ballast").unlink()
    torch.distributed.barrier()
    part.values.fill_(20)
    checkpoints.save(20, {"step": 20})
    return errors


def save_after_the_folder_was_replaced(folder: Path, aside: Path) -> list[str]:
    """Save, replace the run folder with an empty one, as after an unmount, save again, and return the errors."""
    checkpoints, part = manager_of(folder)
    part.values.fill_(1)
    checkpoints.save(1, {"step": 1})
    checkpoints.finish()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        folder.rename(aside)
        folder.mkdir()
    torch.distributed.barrier()
    errors = []
    try:
        checkpoints.save(2, {"step": 2})
    except MachineError as error:
        errors.append(str(error))
    return errors


def report_failed_save(folder: Path) -> tuple[bool, bool]:
    """Return whether a failed background save is reported, first after its failure and then after a successful save."""
    checkpoints, _ = manager_of(folder)
    write, manager.write_shard = manager.write_shard, _full
    checkpoints.save(1, {"step": 1})
    checkpoints._join()
    known = checkpoints.failed
    manager.write_shard = write
    checkpoints.save(2, {"step": 2})
    return known, checkpoints.failed


def _full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Plenty:
    free = 2**60
