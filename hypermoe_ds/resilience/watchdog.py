"""End a job if one of its ranks has died or hangs, and report which rank.

Each rank writes a heartbeat to RUN_DIR/watch every few seconds, from a thread that never waits for another rank. A rank
that makes no progress reads the heartbeats of all ranks to find the cause. A background process kills a rank that
cannot exit.
"""

import faulthandler
import os
import socket
import subprocess
import time
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
from hypermoe_ds.files import delete, write_atomically
from hypermoe_ds.resilience.heartbeat import FAILURE_REPORT, Heartbeat, heartbeat_path, read_heartbeat, read_heartbeats

# Patterns of the files that the ranks write to RUN_DIR/watch.
_WRITTEN = ("rank_*", "stack_*", "told_*", "speaker", f"{FAILURE_REPORT}*")
_LONGEST_PERIOD = 5.0
_SILENT_PERIODS = 3
_SECONDS_TO_END = 10
# This script kills a rank that still runs 10 s after a failure report, because a process that is stopped or waits for a
# disk cannot end itself. Its arguments are the process ID, the start time of the process and the path of the failure
# report. The script ignores SIGTERM, which DeepSpeed's launcher sends to the children of a rank 30 s before it kills
# them. The script compares start times, because the operating system may reuse the ID of a process that has ended.
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
    """Watch this rank's progress. If the rank makes no progress, find the lost rank and end the job.

    The timeout applies from the first `begin`. Until then, only a dead or silent rank counts as lost.

    Args:
        folder: RUN_DIR/watch, which all ranks share.
        rank: this rank.
        ranks: number of ranks.
        timeout: seconds without progress after which the job is ended.
        err: stream for the failure report; None selects stderr.
        show: function that shows progress; each `begin` passes its own arguments to this function.
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
        self._progressed = time.monotonic()
        self._lock = Lock()
        self._ending = Lock()
        self._finished = Event()

    def begin(self, step: int, doing: str, done: int = 0, total: int | None = None) -> None:
        """Record that this rank begins a part of a step. If the part exceeds the timeout, the watchdog searches
        for a lost rank.

        Args:
            step: optimizer step.
            doing: name of the part.
            done: number of items of the part that are done.
            total: number of items, if known.
        """
        self._show(step, doing, done, total)
        if not self._heartbeat.passed:
            limit_collectives(2 * self._timeout)
        with self._lock:
            self._heartbeat = replace(self._heartbeat, step=step, doing=doing, passed=self._heartbeat.passed + 1)
            self._progressed = time.monotonic()

    def each(self, batches: Iterable[Item], doing: str, total: int | None = None) -> Iterator[Item]:
        """Yield the batches; waiting for a batch and using it count as two parts of the step.

        A rank that waits for data has therefore begun fewer parts than ranks that wait in a collective.
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
        """Watch the code inside the context, and end the process if a rank is lost.

        Entering the context is collective.
        """
        thread = Thread(target=self._run, daemon=True)
        try:
            self._prepare()
            thread.start()
            with self._killer():
                yield
        except BaseException as error:
            if _is_lost_connection(error):
                self._end_job()
            self._note_end("error", f"{type(error).__name__}: {error}"[:500])
            raise
        finally:
            self._finished.set()
            if thread.is_alive():
                thread.join()

    def note_end(self, saved: bool) -> None:
        """Record in the heartbeat that this rank has finished."""
        self._note_end("saved" if saved else "done")

    def _prepare(self) -> None:
        """Remove the files of an earlier launch; keep its failure report and stacks in a folder named `previous`."""
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
    def _killer(self) -> Iterator[None]:
        """Run the background process that kills this rank if it does not exit after a failure report."""
        command = ["sh", "-c", _END_WITH_REPORT, "sh", str(os.getpid()), start_time(), str(self._report)]
        closed = subprocess.DEVNULL  # the launcher would wait until an inherited pipe is closed
        process = subprocess.Popen(command, start_new_session=True, stdin=closed, stdout=closed, stderr=closed)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def _run(self) -> None:
        while not self._finished.wait(self._period):
            if self._is_replaced():
                os._exit(EXIT_FAULT)  # this host lost its connection, and the job was restarted without it
            self._beat()
            if self._is_overdue() or self._report.exists():
                self._end_job()

    def _is_replaced(self) -> bool:
        """Return whether a newer process writes the heartbeats of this rank."""
        written = read_heartbeat(heartbeat_path(self._folder, self._heartbeat.rank))
        return written is not None and written.began > self._heartbeat.began

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._progressed > self._timeout

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
        """Write the stacks of this process, find and report the lost rank, and exit.

        Return only if this rank has made progress meanwhile, or if it has not begun to train and no rank is lost.
        """
        with self._ending:
            self._beat()
            stack = self._folder / f"stack_{self._heartbeat.rank:05d}.txt"
            with suppress(OSError), stack.open("w") as file:
                file.write(f"{self._heartbeat.describe()} in {self._heartbeat.position()}\n")
                file.flush()
                faulthandler.dump_traceback(file)
            findings = None if self._report.exists() else self._find_lost_ranks()
            progressed = self._finished.is_set() or not self._is_overdue()
            if findings is not None and current_thread() is not main_thread() and (progressed or not findings):
                self._progressed = time.monotonic()
                stack.unlink(missing_ok=True)
                return
            self._note_end("lost")
            with suppress(OSError):
                self._print_report(findings)
            os._exit(EXIT_FAULT)  # an exception cannot interrupt a blocking call of the main thread

    def _print_report(self, findings: str | None) -> None:
        """Print the failure report once per host.

        The rank that creates the file named `speaker` writes and prints the report. On every other host, one rank also
        prints the report.
        """
        printed = self._folder / f"told_{self._heartbeat.host}"
        try:
            (self._folder / "speaker").touch(exist_ok=False)
        except FileExistsError:
            self._wait_for_report()
            with printed.open("x"):
                print_error(self._report.read_text(), self._err)
        else:
            print_error(str(findings), self._err)
            printed.touch()  # must exist before other ranks can read the report
            write_atomically(self._report, f"{findings}\n")

    def _wait_for_report(self) -> None:
        """Wait until another rank has written the report; give up after 10 s, because that rank may have died."""
        for _ in range(_SECONDS_TO_END * 10):
            if self._report.exists():
                return
            time.sleep(0.1)

    def _find_lost_ranks(self) -> str:
        """Report the failed ranks. If there are none, report silent or finished ranks, or else the slowest ranks.

        Returns:
            The failure report; empty if all ranks are alive and this rank has not begun to train.
        """
        before = read_heartbeats(self._folder)
        absent = [rank for rank in range(self._ranks) if rank not in before]
        failed = _failed(before) + [f"rank {rank} has not begun to train" for rank in absent]
        if failed:
            return self._failure_report(failed)
        for _ in range(_SILENT_PERIODS):
            time.sleep(self._period)
            self._beat()
        after = read_heartbeats(self._folder)
        if failed := _failed(after):  # a killed process closes its connections shortly before it disappears
            return self._failure_report(failed)
        silent = [heartbeat for rank, heartbeat in after.items() if before.get(rank) == heartbeat]
        if silent:
            return self._failure_report(
                _last_seen(rank, f"has ended ({rank.end})" if rank.end else "sends no heartbeat") for rank in silent
            )
        if not self._heartbeat.passed:
            in_collective = current_thread() is main_thread()
            problem = "a collective failed before the first step, but no rank is lost"
            return self._failure_report([problem]) if in_collective else ""
        return self._report_slowest(after)

    def _report_slowest(self, heartbeats: dict[int, Heartbeat]) -> str:
        """Report the live ranks that have begun the fewest parts."""
        least = min(heartbeat.passed for heartbeat in heartbeats.values())
        slowest = [heartbeat for heartbeat in heartbeats.values() if heartbeat.passed == least]
        if len(slowest) < self._ranks:
            own = self._heartbeat.passed == least
            return self._failure_report((_last_seen(rank, "hangs") for rank in slowest), names_own_wait=not own)
        hosts = sorted({heartbeat.host for heartbeat in heartbeats.values()})
        remedy = [f"check the network between {', '.join(hosts)}"] if len(hosts) > 1 else []
        problem = f"no rank has made progress for {self._timeout:.0f} s, and no rank is behind the others"
        return self._failure_report([problem, *remedy])

    def _failure_report(self, findings: Iterable[str], names_own_wait: bool = True) -> str:
        own = f"rank {self._heartbeat.rank} waited in {self._heartbeat.position()}"
        return "; ".join([*findings, *([own] if names_own_wait else []), f"stacks of live ranks are in {self._folder}"])


def _failed(heartbeats: dict[int, Heartbeat]) -> list[str]:
    failed = (heartbeat for heartbeat in heartbeats.values() if heartbeat.has_failed())
    return [_last_seen(heartbeat, heartbeat.error or "died") for heartbeat in failed]


def _last_seen(heartbeat: Heartbeat, state: str) -> str:
    """Describe a rank by its last heartbeat, which is a few seconds old."""
    return f"{heartbeat.describe()} {state}, last seen in {heartbeat.position()}"


def start_time() -> str:
    """Return the start time of this process in clock ticks since boot, which is unique together with the process ID."""
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


def limit_collectives(seconds: float) -> None:
    """Set the timeout of every process group, including DeepSpeed's expert groups; the default is 30 minutes."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether the error comes from a failed collective; gloo raises a plain RuntimeError."""
    if isinstance(error, UserError | MachineError):
        return False
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))
    )
