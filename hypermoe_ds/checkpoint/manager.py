"""Saves and resumes a run: all ranks together, whole or not at all, beside the training."""

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
from safetensors import SafetensorError
from torch import Tensor

from hypermoe_ds.checkpoint import store
from hypermoe_ds.checkpoint.engine_state import EngineState, Held
from hypermoe_ds.checkpoint.manifest import FileEntry, Manifest, Piece, TensorEntry, sync_folder
from hypermoe_ds.checkpoint.settings import CheckpointConfig
from hypermoe_ds.checkpoint.shards import MOMENTS, WEIGHT, CheckpointReader, shard_name, write_shard
from hypermoe_ds.errors import MachineError, UserError
from hypermoe_ds.parallel.host_group import HostGroup

_LOGGER = logging.getLogger(__name__)
_BYTES_OF_PARAMETER = 4 * (1 + len(MOMENTS))
_RANDOM_STATE = "random_state/cpu"
_RANDOM_STATE_OF_GPU = "random_state/cuda"

Value = TypeVar("Value")


class CheckpointManager:
    """Checkpoints of one run. Building it, saving and resuming are collective.

    Args:
        engine: the DeepSpeed engine to save and load.
        checkpoints: RUN_DIR/checkpoints; RUN_DIR exists.
        config: when to save and what to keep.
        settings: the recipe as run, kept in each checkpoint.
    """

    def __init__(self, engine: Any, checkpoints: Path, config: CheckpointConfig, settings: dict[str, Any]) -> None:
        self._state = EngineState(engine)
        self._folder = checkpoints
        self._config = config
        self._settings = settings
        self._device = engine.device
        self._ranks = HostGroup()
        self._tensors = _whole_tensors(self._ranks.gather(self._state.held))
        self._size = _BYTES_OF_PARAMETER * sum(torch.Size(entry.shape).numel() for entry in self._tensors.values())
        self._identity = _identity(checkpoints.parent)
        self._writer: Thread | None = None
        self._failure: Exception | None = None  # of the save beside the training

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        return step % self._config.interval == 0

    def resume(self) -> dict[str, Any] | None:
        """Load the newest good checkpoint, whatever layout wrote it.

        Damaged ones are named and set aside.

        Returns:
            The run's state saved with it, None if there is no checkpoint.

        Raises:
            UserError: there are checkpoints, and `checkpoint.resume` is "none" or none of them is good.
        """
        if self._ranks.rank == 0 and self._folder.is_dir():
            store.remove_unfinished(self._folder)
        step = self._first(lambda: store.latest_step(self._folder))
        if step is None:
            return None
        if self._config.resume == "none":
            raise UserError(
                str(self._folder), "holds checkpoints", "choose another run.dir or set checkpoint.resume=auto"
            )
        step = self._newest_good(step)
        with CheckpointReader(self._folder / store.step_name(step), verify=None) as reader:
            saved = reader.manifest.state
            self._state.load(reader, saved.get("engine", {}))
            if saved.get("ranks") == self._ranks.size:
                self._take_random_state(reader)
        run: dict[str, Any] = saved["run"]
        return run

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint after `step`, then remove old ones. Training may go on before it is on disk.

        Args:
            step: optimizer steps taken.
            state: position of the run, as JSON.

        Raises:
            MachineError: the disk has no room for it, fails or is gone. Of a checkpoint written beside the training
                that is told at once in the log, and the next one is written while training waits.
        """
        began = time.perf_counter()
        self._join()
        failed, self._failure = self._failure, None
        if failed is not None and not isinstance(failed, UserError):
            raise failed
        with _no_fault_of_the_user():
            self._save(step, state, began, beside=self._config.asynchronous and failed is None)

    def _save(self, step: int, state: dict[str, Any], began: float, beside: bool) -> None:
        self.check_room()
        tensors = {name: self._on_host(tensor) for name, tensor in self._state.tensors()} | _random_state()
        saved = {"run": state, "engine": self._state.counters(), "ranks": self._ranks.size}
        if beside:
            self._writer = Thread(target=self._write_beside, args=(step, tensors, saved, began), daemon=True)
            self._writer.start()
            if self._ranks.rank == 0:
                _LOGGER.info("checkpoint of step %d: training waited %.2f s", step, time.perf_counter() - began)
        else:
            self._write(step, tensors, saved)
            if self._ranks.rank == 0:
                _LOGGER.info("checkpoint of step %d: written in %.2f s", step, time.perf_counter() - began)

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            MachineError: it could not be written.
        """
        self._join()
        with _no_fault_of_the_user():
            if self._failure is not None:
                raise self._failure

    @property
    def failed(self) -> bool:
        """Whether this rank has seen the save beside the training fail; others may see it a moment later."""
        return self._failure is not None

    def newest(self) -> Path | None:
        """The newest checkpoint on disk, None where there is none."""
        step = store.latest_step(self._folder)
        return None if step is None else self._folder / store.step_name(step)

    def check_room(self) -> None:
        """Refuse to start a checkpoint that the disk cannot hold. Writes nothing.

        Raises:
            UserError: less is free than a checkpoint takes, the folder cannot be written to, or on some host there is
                another one in its place.
        """
        # The least over the ranks, taken before any of them writes: all go on, or none does.
        free = min(self._ranks.all_or_none(self._free_bytes))
        if free < self._size:
            raise UserError(
                str(self._folder),
                f"{free / 2**30:.2f} GiB are free and a checkpoint takes {self._size / 2**30:.2f} GiB",
                "free some disk or choose another run.dir",
            )

    def _free_bytes(self) -> int:
        run = self._folder.parent
        if _identity(run) != self._identity:
            problem = f"is no longer the folder that the run began in, on {socket.gethostname()}"
            raise UserError(f"run.dir={run}", problem, "mount it there and start again")
        if not os.access(run, os.W_OK):
            raise UserError(f"run.dir={run}", "cannot be written to", "choose another run.dir")
        return shutil.disk_usage(run).free

    def _on_host(self, tensor: Tensor) -> Tensor:
        """On the CPU, and a copy where the training would write into it before it is on disk."""
        return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()

    def _write_beside(self, step: int, tensors: dict[str, Tensor], saved: dict[str, Any], began: float) -> None:
        try:
            self._write(step, tensors, saved)
        except Exception as error:
            self._failure = error
            if self._ranks.rank == 0 and isinstance(error, UserError):
                _LOGGER.error("error: %s", error)
            return
        if self._ranks.rank == 0:
            _LOGGER.info("checkpoint of step %d: on disk after %.2f s", step, time.perf_counter() - began)

    def _write(self, step: int, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        partial = store.partial_folder(self._folder, step)
        rank = self._ranks.rank
        try:
            self._first(lambda: store.begin(self._folder, step))
            entries = self._ranks.all_or_none(lambda: self._in_words(lambda: write_shard(partial, rank, tensors)))
            self._first(lambda: self._publish(step, saved, entries))
        except UserError:
            if rank == 0:  # what it holds may be what the disk lacks
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _publish(self, step: int, saved: dict[str, Any], entries: list[FileEntry]) -> None:
        partial = store.partial_folder(self._folder, step)
        files = {shard_name(rank): entry for rank, entry in enumerate(entries)}
        kinds = (WEIGHT, *MOMENTS) if saved["engine"]["optimizer_steps"] else (WEIGHT,)
        Manifest(step, saved, self._settings, self._tensors, kinds, files).write(partial)
        sync_folder(partial)
        store.publish(self._folder, step)
        store.remove_old(self._folder, step, self._config.keep_last, self._config.keep_every)

    def _newest_good(self, newest: int) -> int:
        """The newest step up to `newest` whose files are what was written."""
        tried: list[UserError] = []
        while True:
            steps = self._first(lambda: [step for step in store.saved_steps(self._folder) if step <= newest])
            if not steps:
                raise UserError(
                    str(self._folder), f"holds no good checkpoint ({tried[0]})", "restore one or choose another run.dir"
                )
            error = self._damage(steps[-1])
            if error is None and tried:
                self._first(lambda step=steps[-1]: store.name_latest(self._folder, step))  # type: ignore[misc]
            if error is None:
                return steps[-1]
            tried.append(error)
            aside = self._first(lambda step=steps[-1]: str(store.set_aside(self._folder, step)))  # type: ignore[misc]
            if self._ranks.rank == 0:
                _LOGGER.warning("warning: %s (set aside as %s)", error, aside)

    def _damage(self, step: int) -> UserError | None:
        """What is wrong with a checkpoint; each rank looks at a part of its files."""
        folder = self._folder / store.step_name(step)

        def look() -> UserError | None:
            try:
                manifest = Manifest.read(folder)
                manifest.check_files(
                    folder, self._config.verify, list(manifest.files)[self._ranks.rank :: self._ranks.size]
                )
            except UserError as error:
                return error
            return None

        return next((error for error in self._ranks.gather(look()) if error is not None), None)

    def _take_random_state(self, reader: CheckpointReader) -> None:
        cpu = reader.beside_parameters(self._ranks.rank, _RANDOM_STATE)
        cuda = reader.beside_parameters(self._ranks.rank, _RANDOM_STATE_OF_GPU)
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self._device)

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _first(self, action: Callable[[], Value]) -> Value:
        return self._ranks.from_first(lambda: self._in_words(action))

    def _in_words(self, action: Callable[[], Value]) -> Value:
        """Do it, and tell a failure of the disk as one line."""
        try:
            return action()
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            problem = f"cannot be written on {socket.gethostname()} ({reason})"
            raise UserError(str(self._folder), problem, "mend that and start again") from None


@contextmanager
def _no_fault_of_the_user() -> Iterator[None]:
    """A disk that fails while a run trains is none of its settings."""
    try:
        yield
    except UserError as error:
        raise MachineError(str(error)) from None


def _identity(folder: Path) -> tuple[int, int] | None:
    """Of a file system and the folder in it; None where there is no such folder."""
    with suppress(OSError):
        status = folder.stat()
        return status.st_dev, status.st_ino
    return None


def _random_state() -> dict[str, Tensor]:
    states = {_RANDOM_STATE: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[_RANDOM_STATE_OF_GPU] = torch.cuda.get_rng_state()
    return states


def _whole_tensors(held: list[dict[str, Held]]) -> dict[str, TensorEntry]:
    """Where each parameter lies, from what each rank holds of it.

    Raises:
        RuntimeError: the parts do not make up the whole.
    """
    tensors = {}
    for name, (shape, _, _) in held[0].items():
        parts = [Piece(rank, *of_rank[name][1:]) for rank, of_rank in enumerate(held)]
        pieces = tuple(sorted((part for part in parts if part.numel), key=lambda piece: piece.start))
        ends = [0, *(piece.start + piece.numel for piece in pieces)]
        if ends[:-1] != [piece.start for piece in pieces] or ends[-1] != torch.Size(shape).numel():
            raise RuntimeError(f"the ranks' parts of {name} do not make up the whole: {pieces}")
        tensors[name] = TensorEntry(tuple(shape), pieces)
    return tensors
