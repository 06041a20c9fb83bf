"""Save and resume a run (collective). Saves are atomic and can run in the background."""

import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from hypermoe_ds.checkpoint import directory
from hypermoe_ds.checkpoint.engine_state import Counters, EngineState, LocalSlice
from hypermoe_ds.checkpoint.manifest import (
    BYTES_OF_ELEMENT,
    FileEntry,
    Manifest,
    SliceEntry,
    TensorEntry,
    Verify,
    shard_name,
)
from hypermoe_ds.checkpoint.run_folder import refuse_other_model
from hypermoe_ds.checkpoint.settings import CheckpointConfig
from hypermoe_ds.checkpoint.shards import (
    MOMENTS,
    WEIGHT,
    CheckpointReader,
    check_shards,
    first_not_finite,
    write_shard,
)
from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import MachineError, UserError
from hypermoe_ds.files import sync_folder
from hypermoe_ds.parallel.control_group import ControlGroup

_LOGGER = logging.getLogger(__name__)
_BYTES_OF_PARAMETER = BYTES_OF_ELEMENT * (1 + len(MOMENTS))
_COUNTERS = TypeAdapter(Counters)
_RANDOM_STATE = "random_state/cpu"
_RANDOM_STATE_OF_GPU = "random_state/cuda"

Value = TypeVar("Value")


class CheckpointManager:
    """The checkpoints of one run. The constructor, saving and resuming are collective.

    Args:
        engine: the DeepSpeed engine to save and load.
        checkpoints: RUN_DIR/checkpoints; RUN_DIR must exist.
        config: when to save and what to keep.
        settings: the resolved recipe, which each checkpoint stores.
    """

    def __init__(self, engine: Any, checkpoints: Path, config: CheckpointConfig, settings: dict[str, Any]) -> None:
        self._state = EngineState(engine)
        self._folder = checkpoints
        self._config = config
        self._settings = settings
        self._device = engine.device
        self._ranks = ControlGroup()
        self._tensors = _whole_tensors(self._ranks.gather(self._state.slices))
        self._size = _BYTES_OF_PARAMETER * sum(entry.numel for entry in self._tensors.values())
        self._identity = _identity(checkpoints.parent)
        self._writer: Thread | None = None
        self._failure: Exception | None = None  # raised by the background save

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`."""
        return step % self._config.interval == 0

    def resume(self) -> dict[str, Any] | None:
        """Load the newest intact checkpoint, regardless of the layout under which it was written.

        If a checkpoint is damaged, log a warning and rename it.

        Returns:
            The state of the run in the checkpoint; None if there is no checkpoint.

        Raises:
            UserError: checkpoints exist, but `checkpoint.resume` is "none", all of them are damaged, or the newest
                intact one belongs to a different model.
        """
        if self._folder.is_dir():
            self._first(lambda: directory.remove_unfinished(self._folder))
        step = self._first(lambda: directory.latest_step(self._folder))
        if step is None:
            return None
        if self._config.resume == "none":
            raise UserError(
                str(self._folder), "has checkpoints", "choose another run.dir or set checkpoint.resume=auto"
            )
        step = self._newest_good(step)
        with CheckpointReader(self._folder / directory.step_name(step), verify=None) as reader:
            self._refuse_other_model(reader.manifest)
            saved = reader.manifest.state
            self._state.load(reader, saved.get("engine", {}))
            if saved.get("ranks") == self._ranks.size:
                self._restore_random_state(reader)
        run: dict[str, Any] = saved["run"]
        return run

    def save(self, step: int, state: dict[str, Any], prune: bool = True) -> None:
        """Save a checkpoint, then delete old ones. With `checkpoint.asynchronous`, return before the save has finished.

        Args:
            step: optimizer steps taken.
            state: training state, as JSON.
            prune: whether to delete old checkpoints.

        Raises:
            MachineError: the disk is full, fails or is missing, or a weight or moment is NaN or infinite. If this
                happens in a background save, the error is logged and the next save blocks training.
        """
        began = time.perf_counter()
        self._join()
        failed, self._failure = self._failure, None
        if failed is not None and not isinstance(failed, UserError):
            raise failed
        with _as_machine_errors():
            self._save(step, state, prune, began, background=self._config.asynchronous and failed is None)

    def _save(self, step: int, state: dict[str, Any], prune: bool, began: float, background: bool) -> None:
        self.check_room()
        tensors = {name: self._on_host(tensor) for name, tensor in self._state.tensors()} | _random_state()
        saved = {
            "run": state,
            "engine": self._state.counters(),
            "ranks": self._ranks.size,
            "model": self._state.model(),
        }
        if background:
            self._writer = Thread(
                target=self._write_in_background, args=(step, tensors, saved, prune, began), daemon=True
            )
            self._writer.start()
            if self._ranks.rank == 0:
                _LOGGER.info("checkpoint of step %d: training waited %.2f s", step, time.perf_counter() - began)
        else:
            self._write(step, tensors, saved, prune)
            if self._ranks.rank == 0:
                _LOGGER.info("checkpoint of step %d: written in %.2f s", step, time.perf_counter() - began)

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            MachineError: the checkpoint could not be written.
        """
        self._join()
        with _as_machine_errors():
            if self._failure is not None:
                raise self._failure

    @property
    def failed(self) -> bool:
        """Whether this rank's background save has failed. Other ranks may notice the failure slightly later."""
        return self._failure is not None

    def last_good(self) -> Path | None:
        """Return the newest intact checkpoint from before the current series of bad steps, or None (collective).

        Checkpoints are verified in full, including a search for NaN, whatever the value of `checkpoint.verify`.
        """
        self._join()
        named = self._first(lambda: directory.named_step(self._folder))
        steps = self._first(lambda: directory.saved_steps(self._folder))
        for step in reversed([step for step in steps if named is None or step <= named]):
            if self._damage(step, "full", before_bad_steps=True) is None:
                return self._folder / directory.step_name(step)
        return None

    def newest(self) -> Path | None:
        """Return the checkpoint that `latest` names, or None if `latest` names no checkpoint."""
        step = directory.named_step(self._folder)
        return None if step is None else self._folder / directory.step_name(step)

    def check_room(self) -> None:
        """Check that the disk has room for a checkpoint, without writing anything.

        Raises:
            UserError: a checkpoint needs more than the free space, the folder is not writable, or on some host the
                path now points to a different folder.
        """
        # All ranks compare the same minimum before any rank writes, so either all ranks continue or none does.
        free = min(self._ranks.gather_or_raise(self._free_bytes))
        if free < self._size:
            raise UserError(
                str(self._folder),
                f"{free / 2**30:.2f} GiB are free, but a checkpoint needs {self._size / 2**30:.2f} GiB",
                "free disk space or choose another run.dir",
            )

    def _free_bytes(self) -> int:
        run = self._folder.parent
        if _identity(run) != self._identity:
            problem = f"is no longer the folder in which the run began, on {socket.gethostname()}"
            raise UserError(f"run.dir={run}", problem, "mount it there and start again")
        if not os.access(run, os.W_OK):
            raise UserError(f"run.dir={run}", "cannot be written", "choose another run.dir")
        return shutil.disk_usage(run).free

    def _on_host(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to host memory, because training may change the tensor before it is written to disk."""
        return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()

    def _write_in_background(
        self, step: int, tensors: dict[str, Tensor], saved: dict[str, Any], prune: bool, began: float
    ) -> None:
        try:
            self._write(step, tensors, saved, prune)
        except Exception as error:
            self._failure = error
            if self._ranks.rank == 0 and isinstance(error, UserError):
                _LOGGER.error("error: %s", error)
            return
        if self._ranks.rank == 0:
            _LOGGER.info("checkpoint of step %d: on disk after %.2f s", step, time.perf_counter() - began)

    def _write(self, step: int, tensors: dict[str, Tensor], saved: dict[str, Any], prune: bool) -> None:
        partial = directory.partial_folder(self._folder, step)
        rank = self._ranks.rank
        self._ranks.gather_or_raise(lambda: self._refuse_not_finite(step, tensors))
        try:
            self._first(lambda: directory.begin(self._folder, step))
            entries = self._ranks.gather_or_raise(
                lambda: self._as_user_error(lambda: write_shard(partial, rank, tensors))
            )
            self._first(lambda: self._publish(step, saved, entries, prune))
        except UserError:
            if rank == 0:  # free the space, because the disk may be full
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _refuse_not_finite(self, step: int, tensors: dict[str, Tensor]) -> None:
        name = first_not_finite(tensors.items())
        if name is not None:
            problem = f"step {step} is not saved: {name} has NaN or Inf on rank {self._ranks.rank}"
            raise UserError(str(self._folder), problem, "resume from an earlier checkpoint")

    def _publish(self, step: int, saved: dict[str, Any], entries: list[FileEntry], prune: bool) -> None:
        partial = directory.partial_folder(self._folder, step)
        files = {shard_name(rank): entry for rank, entry in enumerate(entries)}
        kinds = (WEIGHT, *MOMENTS) if saved["engine"]["optimizer_steps"] else (WEIGHT,)
        Manifest(step, saved, self._settings, self._tensors, kinds, files).write(partial)
        sync_folder(partial)
        directory.publish(self._folder, step)
        if prune:
            directory.remove_old(self._folder, step, self._config.keep_last, self._config.keep_every)

    def _newest_good(self, newest: int) -> int:
        """Find the newest intact checkpoint up to step `newest`, and update `latest`."""
        damage: list[UserError] = []
        while True:
            steps = self._first(lambda: [step for step in directory.saved_steps(self._folder) if step <= newest])
            if not steps:
                raise UserError(
                    str(self._folder),
                    f"has no good checkpoint up to step {newest} ({damage[0]})",
                    "restore one or choose another run.dir",
                )
            step = steps[-1]
            error = self._damage(step, self._config.verify)
            if error is None:
                self._first(lambda: self._name_latest(step))  # noqa: B023 (called at once)
                if damage and self._ranks.rank == 0:
                    _LOGGER.info("using the checkpoint of step %d instead", step)
                return step
            damage.append(error)
            aside = self._first(lambda: str(directory.set_aside(self._folder, step)))  # noqa: B023
            if self._ranks.rank == 0:
                _LOGGER.warning("warning: %s (renamed to %s)", error, aside)

    def _name_latest(self, step: int) -> None:
        if directory.named_step(self._folder) != step:
            directory.name_latest(self._folder, step)

    def _damage(self, step: int, verify: Verify, before_bad_steps: bool = False) -> UserError | None:
        """Verify a checkpoint and return the first error found, or None (collective).

        Each rank checks some of the files.

        Args:
            step: step of the checkpoint.
            verify: what to compare; "full" also checks for NaN and Inf.
            before_bad_steps: treat a checkpoint written during consecutive bad steps as damaged.

        Raises:
            UserError: the disk fails.
        """
        folder = self._folder / directory.step_name(step)

        def check() -> list[UserError]:
            try:
                with CheckpointReader(folder, verify=None) as reader:
                    self._check(reader, verify)
                    if before_bad_steps and reader.manifest.state["run"].get("bad_steps"):
                        raise UserError(str(folder), "was written during bad steps", "choose another checkpoint")
            except UserError as error:
                return [error]
            return []

        found = self._ranks.gather_or_raise(lambda: self._as_user_error(check, "read"))
        return next((error for errors in found for error in errors), None)

    def _check(self, reader: CheckpointReader, verify: Verify) -> None:
        manifest, folder = reader.manifest, reader.folder
        mine = list(manifest.files)[self._ranks.rank :: self._ranks.size]
        check_shards(folder, manifest, verify, mine)
        if not _has_state(manifest):
            raise UserError(str(folder), "does not have the state of a run", "choose another checkpoint")
        name = reader.first_not_finite(mine) if verify == "full" else None
        if name is not None:
            raise UserError(str(folder), f"has NaN or Inf in {name}", "choose another checkpoint")

    def _refuse_other_model(self, manifest: Manifest) -> None:
        """Check that a checkpoint has the model configuration, parameter names and shapes of this run.

        Raises:
            UserError: the models differ.
        """
        if "model" in manifest.state:
            refuse_other_model(self._state.model(), manifest.state["model"], self._folder.parent)
        ours, theirs = ({name: entry.shape for name, entry in of.items()} for of in (self._tensors, manifest.tensors))
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                here, there = (str(list(of[name])) if name in of else "missing" for of in (ours, theirs))
                raise UserError(
                    f"model: {name}",
                    f"is {here}, but {there} in step {manifest.step} of {self._folder.parent}",
                    "choose another run.dir or use the model of that run",
                )

    def _restore_random_state(self, reader: CheckpointReader) -> None:
        cpu = reader.extra_tensor(self._ranks.rank, _RANDOM_STATE)
        cuda = reader.extra_tensor(self._ranks.rank, _RANDOM_STATE_OF_GPU)
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self._device)

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _first(self, action: Callable[[], Value]) -> Value:
        return self._ranks.run_on_rank0(lambda: self._as_user_error(action))

    def _as_user_error(self, action: Callable[[], Value], done: str = "written") -> Value:
        """Run `action` and convert a disk failure to a `UserError`."""
        try:
            return action()
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            problem = f"cannot be {done} on {socket.gethostname()} ({reason})"
            raise UserError(str(self._folder), problem, "fix the cause and start again") from None


@contextmanager
def _as_machine_errors() -> Iterator[None]:
    """Convert user errors to machine errors: a disk failure during training is not the user's mistake."""
    try:
        yield
    except UserError as error:
        raise MachineError(str(error)) from None


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder, or None if it does not exist."""
    with suppress(OSError):
        status = folder.stat()
        return status.st_dev, status.st_ino
    return None


def _has_state(manifest: Manifest) -> bool:
    """Return whether a checkpoint contains everything that a resume needs."""
    counters = manifest.state.get("engine")
    try:
        trained = bool(counters) and _COUNTERS.validate_python(counters).optimizer_steps > 0
    except ValidationError:
        return False
    return "run" in manifest.state and set(manifest.kinds) == {WEIGHT, *(MOMENTS if trained else ())}


def _random_state() -> dict[str, Tensor]:
    states = {_RANDOM_STATE: torch.get_rng_state()}
    if uses_gpu():
        states[_RANDOM_STATE_OF_GPU] = torch.cuda.get_rng_state()
    return states


def _whole_tensors(slices: list[dict[str, LocalSlice]]) -> dict[str, TensorEntry]:
    """Combine the slices of all ranks into the entries of the manifest.

    Raises:
        RuntimeError: the slices do not cover a parameter exactly.
    """
    tensors = {}
    for name, (shape, _, _) in slices[0].items():
        parts = [SliceEntry(rank, *of_rank[name][1:]) for rank, of_rank in enumerate(slices)]
        pieces = tuple(sorted((part for part in parts if part.numel), key=lambda piece: piece.start))
        ends = [0, *(piece.start + piece.numel for piece in pieces)]
        if ends[:-1] != [piece.start for piece in pieces] or ends[-1] != torch.Size(shape).numel():
            raise RuntimeError(f"the ranks' slices of {name} do not cover it exactly: {pieces}")
        tensors[name] = TensorEntry(tuple(shape), pieces)
    return tensors
