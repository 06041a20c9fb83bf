"""Tests of JobProcesses: it finds and ends the processes of its own job only, whoever started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from hypermoe_ds.cluster.job_processes import JobProcesses

# Program of a rank that saves on SIGTERM or SIGUSR1. Saving takes a moment.
PROGRAM = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    time.sleep(0.3)
    Path(sys.argv[1], "saved").write_text(str(number))
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
Path(sys.argv[1], "ready").touch()
time.sleep(1000)
"""


class Started:
    """Processes that a test starts from a shell that exits. They become orphans, as after the death of a launcher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[psutil.Process] = []

    def orphan(self, environment: Mapping[str, str]) -> psutil.Process:
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        words = ["sh", "-c", 'setsid "$0" "$@" >/dev/null & echo $!', sys.executable, "-c", PROGRAM, str(self.folder)]
        done = subprocess.run(
            words, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True, close_fds=True
        )
        while not ready.exists():
            time.sleep(0.01)
        self.all.append(psutil.Process(int(done.stdout)))
        return self.all[-1]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    processes = Started(tmp_path)
    yield processes
    for process in processes.all:
        if process.is_running():
            process.kill()


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


RANK = {"RANK": "3"}


def test_an_orphaned_rank_saves_before_it_ends_and_other_jobs_continue(started: Started) -> None:
    job, other = JobProcesses([]), JobProcesses([])
    rank, helper = started.orphan(job.environment | RANK), started.orphan(job.environment)
    strangers = [started.orphan(other.environment | RANK), started.orphan(RANK)]
    job.end(1)
    assert not is_running(rank)
    assert not is_running(helper)
    assert (started.folder / "saved").read_text() == str(int(signal.SIGTERM))
    assert all(map(is_running, strangers))


def test_a_stopped_rank_is_ended_too(started: Started) -> None:
    job = JobProcesses([])
    rank = started.orphan(job.environment | RANK)
    rank.suspend()
    job.end(0)
    assert not is_running(rank)


def test_signal_ranks_signals_only_ranks_and_returns_whether_there_are_any(started: Started) -> None:
    job = JobProcesses([])
    launcher = started.orphan(job.environment)
    assert not job.signal_ranks(signal.SIGUSR1)
    rank = started.orphan(job.environment | RANK)
    assert job.signal_ranks(signal.SIGUSR1)
    psutil.wait_procs([rank], timeout=10)
    assert (started.folder / "saved").read_text() == str(int(signal.SIGUSR1))
    assert is_running(launcher)


def test_a_process_of_another_job_that_reuses_a_pid_is_not_signalled(started: Started) -> None:
    job = JobProcesses([])
    rank, stranger = started.orphan(job.environment | RANK), started.orphan(RANK)
    job._everywhere(f"signal KILL {stranger.pid} {rank.pid}", 10)
    psutil.wait_procs([rank], timeout=10)
    assert (is_running(rank), is_running(stranger)) == (False, True)
