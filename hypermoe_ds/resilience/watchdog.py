"""Ends a job of which a rank has died or hangs, and says which one it was.

Each rank writes a sign of life into RUN_DIR/watch every few seconds, from a thread that needs no other rank. Only a
rank that waits in vain reads those of the others. A process beside each rank ends it where it cannot do that itself.
"""

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from threading import Event, Lock, Thread, current_thread, main_thread
from typing import TextIO, TypeVar

import torch
import torch.distributed
from torch.distributed import distributed_c10d as c10d

from hypermoe_ds.errors import EXIT_FAULT, MachineError, UserError, print_error
from hypermoe_ds.files import delete, write_whole
from hypermoe_ds.resilience.heartbeat import FAILURE_REPORT, Heartbeat, heartbeat_path, read_heartbeat, read_heartbeats

_WRITTEN = (
    "rank_*",
    "stack_*",
    "told_*",
    "speaker",
    f"{FAILURE_REPORT}*",
)  # names of what ranks write into RUN_DIR/watch
_LONGEST_PERIOD = 5.0
_SILENT_PERIODS = 3
_SECONDS_TO_END = 10
# Arguments: a process, when it began, the verdict. A stopped process, or one that waits for a disk, does not end
# itself. DeepSpeed's launcher sends SIGTERM to a rank's children too, and then waits for half a minute. The process may
# end in these seconds and its number go to another one: only one that began at the same time is killed.
_END_WITH_REPORT = f"""
trap '' TERM
runs() {{ [ "$(sed 's/.*) //' "/proc/$1/stat" | cut -d ' ' -f 20)" = "$2" ]; }}
while runs "$1" "$2"; do
    if [ -e "$3" ]; then
        sleep {_SECONDS_TO_END}
        if runs "$1" "$2"; then kill -KILL "$1"; fi
    fi
    sleep 1
done
"""
Item = TypeVar("Item")


class Watchdog:
    """Watches this rank's progress, and looks at the other ranks when there is none.

    Before the first `begin` a rank may take as long as it needs: only one that is dead or silent is lost then.

    Args:
        folder: RUN_DIR/watch, seen by all ranks.
        rank: this rank.
        ranks: number of ranks.
        timeout: seconds without progress after which the job is ended.
        err: where the failure report is printed; None takes stderr.
        show: shows what this rank does: a step, what is done in it, and how many parts of how many of that.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        timeout: float,
        err: TextIO | None = None,
        show: Callable[[int, str, int, int | None], None] | None = None,
    ) -> None:
        self._err = err
        self._show = show or (lambda _step, _doing, _done, _total: None)
        self._folder = folder
        self._ranks = ranks
        self._timeout = timeout
        self._period = min(_LONGEST_PERIOD, timeout / 10)
        self._heartbeat = Heartbeat(rank, socket.gethostname(), os.getpid(), 0, "starting", 0, 0, began=time.time())
        self._since = time.monotonic()
        self._lock = Lock()
        self._ending = Lock()
        self._over = Event()

    def begin(self, step: int, doing: str, done: int = 0, total: int | None = None) -> None:
        """This rank begins something that ends within the timeout, or a rank is lost.

        Args:
            step: optimizer step.
            doing: what it begins.
            done: how many parts of that are done.
            total: how many parts it has, if that is known.
        """
        self._show(step, doing, done, total)
        if not self._heartbeat.passed:
            limit_collectives(2 * self._timeout)
        with self._lock:
            self._heartbeat = replace(self._heartbeat, step=step, doing=doing, passed=self._heartbeat.passed + 1)
            self._since = time.monotonic()

    def each(self, batches: Iterable[Item], doing: str, total: int | None = None) -> Iterator[Item]:
        """Hand the batches on, `total` of them; waiting for each, and what is done with it, is begun anew.

        A rank that waits for data is therefore behind the others, which wait for it in a collective.
        """
        iterator = iter(batches)
        for done in count():
            self.begin(self._heartbeat.step, "waiting for data")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.begin(self._heartbeat.step, doing, done, total)
            yield batch

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is done inside; ends the process if a rank is lost. The begin is collective."""
        thread = Thread(target=self._run, daemon=True)
        try:
            self._prepare()
            thread.start()
            with self._beside():
                yield
        except BaseException as error:
            if _is_lost_connection(error):
                self._end_job()
            self._note_end("error", f"{type(error).__name__}: {error}"[:500])
            raise
        finally:
            self._over.set()
            if thread.is_alive():
                thread.join()

    def note_end(self, saved: bool) -> None:
        """Write down that this rank has come to its end."""
        self._note_end("saved" if saved else "done")

    def _prepare(self) -> None:
        """Take away what an earlier start left, before anyone watches; the stacks of a lost one are kept."""
        if self._heartbeat.rank == 0:
            previous = self._folder / "previous"
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._report.exists():
                if os.path.lexists(previous):
                    delete(previous)
                previous.mkdir()
                for path in (self._report, *self._folder.glob("stack_*")):
                    path.replace(previous / path.name)
            for pattern in _WRITTEN:
                for path in self._folder.glob(pattern):
                    delete(path)
        torch.distributed.barrier()
        self._beat()
        torch.distributed.barrier()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        words = ["sh", "-c", _END_WITH_REPORT, "sh", str(os.getpid()), start_time(), str(self._report)]
        nowhere = subprocess.DEVNULL  # it keeps no pipe of the launcher's open
        process = subprocess.Popen(words, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def _run(self) -> None:
        while not self._over.wait(self._period):
            if self._is_replaced():
                os._exit(EXIT_FAULT)  # the job was started again while this host was cut off
            self._beat()
            if self._is_overdue() or self._report.exists():
                self._end_job()

    def _is_replaced(self) -> bool:
        """Whether a later process writes the signs of this rank."""
        written = read_heartbeat(heartbeat_path(self._folder, self._heartbeat.rank))
        return written is not None and written.began > self._heartbeat.began

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._since > self._timeout

    def _beat(self) -> None:
        with self._lock:
            self._heartbeat = replace(self._heartbeat, beats=self._heartbeat.beats + 1)
            self._heartbeat.write(self._folder)

    def _note_end(self, end: str, error: str = "") -> None:
        with self._lock:
            self._heartbeat = replace(self._heartbeat, end=end, error=error)
            self._heartbeat.write(self._folder)

    @property
    def _report(self) -> Path:
        return self._folder / FAILURE_REPORT

    def _end_job(self) -> None:
        """Write this rank's stack down, find out who is lost, and end.

        Returns only where this rank came on after all, or has not begun to train and nobody is lost.
        """
        with self._ending:
            self._beat()
            stack = "".join(traceback.format_stack(sys._current_frames()[main_thread().ident or 0]))
            path = self._folder / f"stack_{self._heartbeat.rank:05d}.txt"
            with suppress(OSError):
                path.write_text(f"{self._heartbeat.describe()} in {self._heartbeat.position()}\n{stack}")
            findings = None if self._report.exists() else self._findings()
            came_on = self._over.is_set() or not self._is_overdue()
            if findings is not None and current_thread() is not main_thread() and (came_on or not findings):
                self._since = time.monotonic()
                path.unlink(missing_ok=True)
                return
            self._note_end("lost")
            with suppress(OSError):
                self._print_report(findings)
            os._exit(EXIT_FAULT)  # the main thread may be where no exception reaches it

    def _print_report(self, findings: str | None) -> None:
        """The first rank to come here writes the verdict and tells it; of each other host the first one repeats it."""
        printed = self._folder / f"told_{self._heartbeat.host}"
        try:
            (self._folder / "speaker").touch(exist_ok=False)
        except FileExistsError:
            self._wait_for_report()
            with printed.open("x"):
                print_error(self._report.read_text(), self._err)
        else:
            print_error(str(findings), self._err)
            printed.touch()  # before others can read the verdict
            write_whole(self._report, f"{findings}\n")

    def _wait_for_report(self) -> None:
        """Another rank is about to write it, but may be ended before it has."""
        for _ in range(_SECONDS_TO_END * 10):
            if self._report.exists():
                return
            time.sleep(0.1)

    def _findings(self) -> str:
        """Which rank is lost: one that has failed, else one that is silent or done, else the one that is behind.

        Empty where all ranks live and this one has not begun to train and still may.
        """
        where = f"rank {self._heartbeat.rank} waited in {self._heartbeat.position()}"
        waited = f"{where}; stacks of live ranks are in {self._folder}"
        before = read_heartbeats(self._folder)
        missing = _missing(before) + [
            f"rank {rank} has not begun to train" for rank in range(self._ranks) if rank not in before
        ]
        if missing:
            return f"{'; '.join(missing)}; {waited}"
        for _ in range(_SILENT_PERIODS):
            time.sleep(self._period)
            self._beat()
        after = read_heartbeats(self._folder)
        if missing := _missing(after):  # a killed process closes its connections some time before it is gone
            return f"{'; '.join(missing)}; {waited}"
        silent = [
            _described(heartbeat, f"has ended ({heartbeat.end})" if heartbeat.end else "gives no sign of life")
            for rank, heartbeat in after.items()
            if before.get(rank) == heartbeat
        ]
        if silent:
            return f"{'; '.join(silent)}; {waited}"
        if not self._heartbeat.passed:
            failed = current_thread() is main_thread()
            return f"a collective failed before the first step and no rank is lost; {waited}" if failed else ""
        least = min(heartbeat.passed for heartbeat in after.values())
        behind = [heartbeat for heartbeat in after.values() if heartbeat.passed == least]
        if len(behind) == self._ranks:
            hosts = sorted({heartbeat.host for heartbeat in after.values()})
            remedy = f"look at the network between {', '.join(hosts)}; " if len(hosts) > 1 else ""
            return f"no rank has come on for {self._timeout:.0f} s and none is behind; {remedy}{waited}"
        if self._heartbeat.passed == least:
            waited = waited.partition("; ")[2]
        return f"{'; '.join(_described(heartbeat, 'hangs') for heartbeat in behind)}; {waited}"


def _missing(heartbeats: dict[int, Heartbeat]) -> list[str]:
    return [
        _described(heartbeat, heartbeat.error or "died") for heartbeat in heartbeats.values() if heartbeat.has_failed()
    ]


def _described(heartbeat: Heartbeat, fate: str) -> str:
    """A sign is some seconds old."""
    return f"{heartbeat.describe()} {fate}, last heard of in {heartbeat.position()}"


def start_time() -> str:
    """When this process began, in clock ticks since the machine did: with its number that names it alone."""
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


def limit_collectives(seconds: float) -> None:
    """Give every process group this timeout, DeepSpeed's groups of experts too, whose own is 30 minutes."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed; gloo raises a bare RuntimeError."""
    if isinstance(error, UserError | MachineError):
        return False
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))
    )
