"""After faults of ranks, launchers, hosts, networks and disks, a supervised job on two hosts reaches the same results.

Most tests are marked slow, because they launch a job at least twice, each time after a preflight.
"""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hypermoe_ds.monitor.summary import read_records
from hypermoe_ds.resilience.heartbeat import Heartbeat, read_heartbeats
from tests.helpers.faulty_train import PARAMETER
from tests.helpers.jobs import RECORDED_TRAIN, REPOSITORY, arguments_of, logged_steps, run_script
from tests.helpers.routing import assert_same_until_a_tie, read_routing
from tests.helpers.two_hosts import TwoHosts, two_hosts, unsupported_reason

STEPS, INTERVAL, TIMEOUT = 60, 5, 20
LONGEST_WAIT = 300
# Learning rate for runs that change their layout. At the recipe's rate, which is ten times higher, AdamW amplifies the
# rounding error of small gradients until selections and ReLUs differ after 20 steps. At this rate, all 60 losses agreed
# within 2e-7.
STEADY = "optimizer.lr=1e-3"
SETTINGS = [
    "parallel.expert=2", f"train.collective_timeout={TIMEOUT}", "evaluation.interval=1000000",
    f"checkpoint.interval={INTERVAL}",
]  # fmt: skip


@dataclass
class SupervisedJob:
    """A job with one rank per host and the supervisor on the first host.

    Attributes:
        hosts: the two hosts.
        folder: working directory.
        run: the run folder as this test sees it.
        process: the supervisor.
    """

    hosts: TwoHosts
    folder: Path
    run: Path
    process: "subprocess.Popen[str]"

    def output(self) -> str:
        return (self.folder / "stdout").read_text() + (self.folder / "stderr").read_text()

    def heartbeats(self) -> dict[int, Heartbeat]:
        return read_heartbeats(self.run / "watch")

    def step(self) -> int:
        """Return the last logged step."""
        path = self.run / "metrics.jsonl"
        return max((record["step"] for record in read_records(path)), default=0) if path.exists() else 0

    def until(self, condition: Callable[[], bool]) -> float:
        """Wait for a condition and return the waiting time in seconds."""
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() - began < LONGEST_WAIT, self.output()
            time.sleep(0.05)
        return time.monotonic() - began

    def reaches(self, step: int) -> None:
        self.until(lambda: self.step() >= step)

    def rank_on(self, host: str) -> int:
        """Return the process id of the rank on a host, in the host's own PID namespace."""
        [heartbeat] = [heartbeat for heartbeat in self.heartbeats().values() if heartbeat.host == host]
        return heartbeat.process

    def on(self, host: str, *words: object) -> str:
        done = self.hosts.run(host, *words, folder=self.folder)
        assert done.returncode == 0, done.output()
        return done.stdout.strip()

    def ends(self) -> list[dict[str, Any]]:
        """Wait until the job is done and return the record of each attempt."""
        assert self.process.wait(LONGEST_WAIT) == 0, self.output()
        return [json.loads(line) for line in (self.run / "supervisor.jsonl").read_text().splitlines()]

    def has_ended_on(self, *hosts: str) -> bool:
        """Return whether all processes of the job have ended on these hosts, after waiting up to 15 s."""
        end = time.monotonic() + 15
        words = ["bash", "-c", "grep -lzs ^HYPERMOE_JOB= /proc/[0-9]*/environ || true"]
        while left := [host for host in hosts if self.on(host, *words)]:
            if time.monotonic() > end:
                return False
            time.sleep(0.5)
        return not left


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    if missing := unsupported_reason("pdsh"):
        pytest.skip(missing)
    with two_hosts(tmp_path / "hosts") as up:
        yield up


@contextmanager
def supervised(
    hosts: TwoHosts,
    folder: Path,
    recipe: Path,
    *overrides: str,
    steps: int = STEPS,
    restarts: int = 5,
    fault: str = "",
    recorded: bool = False,
    run: str = "run",
    seen: str = "run",
) -> Iterator[SupervisedJob]:
    """Start a supervised job with the user's command.

    Args:
        hosts: the hosts.
        folder: working directory.
        recipe: recipe of the job.
        overrides: overrides of the recipe.
        steps: length of the run.
        restarts: number of restarts that the supervisor allows.
        fault: KIND:RANK:STEP, a fault of faulty_train.py.
        recorded: whether the ranks record the routing of each token.
        run: the run folder on the hosts.
        seen: the run folder as this test sees it.
    """
    (folder / "hostfile").write_text("left slots=1\nright slots=1\n")
    train = "tests/helpers/faulty_train.py" if fault else RECORDED_TRAIN if recorded else None
    repository = with_other_train(folder, train) if train else REPOSITORY
    arguments = arguments_of(recipe, f"run.dir={folder / run}", f"train.steps={steps}", *SETTINGS, *overrides)
    launcher = ["bash", repository / "launch/pdsh.sh", "--no-preflight", "--hostfile", "{hosts}", *arguments]
    supervisor = ["python", repository / "launch/supervise.py", "--hostfile", "hostfile", "--max-restarts", restarts]
    environment = {"PYTHONUNBUFFERED": "1"}
    if train:
        environment |= {"HYPERMOE_FAULT": f"{fault}:{folder / 'fault'}", "HYPERMOE_REPOSITORY": str(repository)}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as errors:
        process = hosts.start(
            "left", *supervisor, "--", *launcher, folder=folder, out=out, errors=errors, **environment
        )
        try:
            yield SupervisedJob(hosts, folder, folder / seen, process)
        finally:
            process.kill()
            process.wait()


def with_other_train(folder: Path, script: str) -> Path:
    """Create a copy of this repository, made of symbolic links, with a different train.py."""
    repository = folder / "repository"
    repository.mkdir()
    for name in ("hypermoe_ds", "launch", "tools", "tests", "ds_configs"):
        (repository / name).symlink_to(REPOSITORY / name)
    (repository / "pretrain").mkdir()
    (repository / "pretrain/train.py").write_text(
        f"import runpy\n\nrunpy.run_path({str(REPOSITORY / script)!r}, run_name='__main__')\n"
    )
    return repository


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> "Undisturbed":
    """Return a function that trains a run with two ranks on one host, without faults, and returns its folder."""
    found: dict[tuple[object, ...], Path] = {}

    def run(steps: int, *overrides: str) -> Path:
        if (steps, *overrides) not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            settings = [f"run.dir={folder / 'run'}", f"train.steps={steps}", *SETTINGS, *overrides]
            run_script(RECORDED_TRAIN, *arguments_of(recipe, *settings), folder=folder, ranks=2)
            found[(steps, *overrides)] = folder / "run"
        return found[(steps, *overrides)]

    return run


Undisturbed = Callable[..., Path]


def assert_same_steps(job: SupervisedJob, expected: Path) -> None:
    """Check that all logged values are bitwise identical, as expected with the same number of ranks."""
    assert logged_steps(job.run) == logged_steps(expected)


def assert_same_losses(job: SupervisedJob, expected: Path) -> None:
    """Check that losses agree up to a tie between experts. Fewer ranks round differently, which can decide a tie."""
    found, there = ([[step["loss"], step["grad_norm"]] for step in logged_steps(run)] for run in (job.run, expected))
    routing = read_routing(job.run, STEPS), read_routing(expected, STEPS)
    assert_same_until_a_tie(list(found), list(there), routing, 1e-5)


def outcomes(attempts: list[dict[str, Any]]) -> list[str]:
    return [entry["outcome"] for entry in attempts]


def work_lost(job: SupervisedJob) -> list[int]:
    """Return the number of steps that each launch repeated."""
    launches = map(json.loads, (job.run / "launches.jsonl").read_text().splitlines())
    resumed = [launch["step"] for launch in launches if "ended" not in launch]
    ended = [json.loads(line)["step"] for line in (job.run / "supervisor.jsonl").read_text().splitlines()]
    return [last - first for last, first in zip(ended, resumed[1:], strict=False)]


def test_a_killed_rank_on_the_second_host_costs_less_than_a_checkpoint_interval(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with supervised(hosts, tmp_path, recipe) as job:
        job.reaches(12)
        job.on("right", "kill", "-KILL", job.rank_on("right"))
        attempts = job.ends()
        assert job.has_ended_on("left", "right")
    assert outcomes(attempts) == ["lost", "done"]
    assert "rank 1 (process " in attempts[0]["what"]
    assert max(work_lost(job)) <= INTERVAL + 1
    assert_same_steps(job, undisturbed(STEPS))


def test_after_a_power_failure_of_a_host_the_run_continues_without_it(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with supervised(hosts, tmp_path, recipe, STEADY, recorded=True) as job:
        job.reaches(12)
        hosts.crash("right")
        attempts = job.ends()
        assert job.has_ended_on("left")
    assert outcomes(attempts) == ["lost", "done"]
    assert "1 of 2 hosts can train: left parallel.expert=1" in job.output()
    assert max(work_lost(job)) <= INTERVAL + 1
    assert_same_losses(job, undisturbed(STEPS, STEADY))


@pytest.mark.slow
def test_after_a_killed_launcher_on_the_second_host_the_job_saves_and_restarts(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with supervised(hosts, tmp_path, recipe) as job:
        job.reaches(12)
        launcher = job.on("right", "ps", "-o", "ppid=", "-p", job.rank_on("right"))
        job.on("right", "kill", "-KILL", launcher)
        attempts = job.ends()
        assert job.has_ended_on("left", "right")
    assert outcomes(attempts) == ["saved", "done"]
    assert work_lost(job)[0] == 0
    assert_same_steps(job, undisturbed(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [5, 120])
def test_a_network_outage_is_tolerated_up_to_the_timeout_and_excludes_the_host_after_it(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed, seconds: int
) -> None:
    with supervised(hosts, tmp_path, recipe, STEADY, recorded=True) as job:
        job.reaches(12)
        hosts.disconnect("right")
        cut = time.monotonic()
        job.until(lambda: time.monotonic() - cut > seconds or job.step() == STEPS)
        hosts.reconnect("right")
        attempts = job.ends()
        assert job.has_ended_on("left", "right")
    short = seconds < TIMEOUT
    assert outcomes(attempts) == (["done"] if short else ["lost", "done"])
    assert short or max(work_lost(job)) <= INTERVAL + 1
    (assert_same_steps if short else assert_same_losses)(job, undisturbed(STEPS, STEADY))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["rank", "launcher"])
def test_a_signal_to_one_rank_or_to_the_launcher_saves_and_restarts(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed, to: str
) -> None:
    with supervised(hosts, tmp_path, recipe) as job:
        job.reaches(12)
        process = job.rank_on("right")
        if to == "launcher":  # the deepspeed command, which ends the job on all hosts
            process = int(job.on("left", "pgrep", "-f", "^[^ ]*python[^ ]* [^ ]*/deepspeed .*--force_multi"))
        job.on("right" if to == "rank" else "left", "kill", "-TERM", process)
        attempts = job.ends()
        assert job.has_ended_on("left", "right")
    assert outcomes(attempts) == ["saved", "done"]
    assert work_lost(job)[0] == 0
    assert_same_steps(job, undisturbed(STEPS))


@pytest.mark.slow
def test_a_stopped_rank_is_killed_with_the_job(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with supervised(hosts, tmp_path, recipe) as job:
        job.reaches(12)
        job.on("right", "kill", "-STOP", job.rank_on("right"))
        stopped = time.monotonic()
        attempts = job.ends()
        assert job.has_ended_on("left", "right")
        assert attempts[0]["began"] + attempts[0]["seconds"] - time.time() + time.monotonic() - stopped < 3 * TIMEOUT
    assert outcomes(attempts) == ["lost", "done"]
    assert "on right) sends no heartbeat" in attempts[0]["what"]
    assert max(work_lost(job)) <= INTERVAL + 1
    assert_same_steps(job, undisturbed(STEPS))


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a small file system, which is visible to hosts started inside the context."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("until", ["the next save", "the job has ended"])
def test_a_job_continues_after_a_full_disk_is_freed(
    recipe: Path, tmp_path: Path, undisturbed: Undisturbed, until: str
) -> None:
    if missing := unsupported_reason("pdsh"):
        pytest.skip(missing)
    with (
        small_disk(tmp_path / "disk", 256) as disk,
        two_hosts(tmp_path / "hosts") as hosts,
        supervised(hosts, tmp_path, recipe, run="disk/run", seen="disk/run") as job,
    ):
        job.reaches(12)
        ballast = disk / "ballast"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - (1 << 16))  # leaves room for log lines, but not for checkpoints
        job.until(lambda: "checkpoints: " in job.output() and "GiB are free" in job.output())
        if until == "the job has ended":
            job.until(lambda: "supervisor: no host can train" in job.output())
        ballast.unlink()
        attempts = job.ends()
        assert_same_steps(job, undisturbed(STEPS))
        assert outcomes(attempts)[-1] == "done"
        assert len(attempts) == 2
        assert max(work_lost(job)) <= INTERVAL + 1


@pytest.mark.slow
def test_a_host_that_lost_the_run_folder_is_excluded(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "run").mkdir()
    for host in ("left", "right"):
        assert hosts.run(host, "mount", "--bind", "storage", "run", folder=tmp_path).returncode == 0
    with supervised(hosts, tmp_path, recipe, STEADY, seen="storage", recorded=True) as job:
        job.reaches(12)
        job.on("right", "umount", "--lazy", "run")
        attempts = job.ends()
    assert outcomes(attempts) == ["error", "done"]
    assert "is no longer the folder in which the run began, on right" in attempts[0]["what"]
    assert max(work_lost(job)) <= INTERVAL + 1
    assert_same_losses(job, undisturbed(STEPS, STEADY))


@pytest.mark.slow
def test_a_nan_in_one_gradient_skips_the_step_and_training_continues(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with supervised(hosts, tmp_path, recipe, fault="nan:1:4") as job:
        attempts = job.ends()
    assert outcomes(attempts) == ["done"]
    assert "warning: step 4 skipped: NaN or Inf in its loss (" in job.output()
    found = logged_steps(job.run)
    assert (found[3]["skipped_steps"], found[-1]["skipped_steps"]) == (1, 1)
    assert found[:3] == logged_steps(undisturbed(STEPS))[:3]
    assert len(found) == STEPS


@pytest.mark.slow
def test_a_flipped_bit_in_one_replica_is_reported_and_the_job_restarts(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with supervised(hosts, tmp_path, recipe, "train.consistency_interval=1", fault="flip:1:12") as job:
        attempts = job.ends()
    assert outcomes(attempts) == ["error", "done"]
    assert f"the copies of {PARAMETER} differ after step 12: ranks 0, 1 disagree" in attempts[0]["what"]
    assert max(work_lost(job)) <= INTERVAL + 1
    assert_same_steps(job, undisturbed(STEPS))


@pytest.mark.slow
def test_twenty_kills_at_random_times_change_no_result(
    hosts: TwoHosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    kills, steps, moments = 20, 800, random.Random(7)
    known: set[tuple[str, int]] = set()
    with supervised(hosts, tmp_path, recipe, steps=steps, restarts=kills) as job:
        for _ in range(kills):
            known |= new_ranks(job, known)
            time.sleep(moments.uniform(0, 4))
            victim = moments.choice(list(job.heartbeats().values()))
            job.on(victim.host, "kill", "-KILL", victim.process)
        attempts = job.ends()
        assert job.has_ended_on("left", "right")
    assert outcomes(attempts) == ["lost"] * kills + ["done"]
    assert_same_steps(job, undisturbed(steps))


def new_ranks(job: SupervisedJob, known: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Wait for the ranks of a new attempt, and return their hosts and process ids."""

    def found() -> set[tuple[str, int]]:
        return {
            (heartbeat.host, heartbeat.process) for heartbeat in job.heartbeats().values() if not heartbeat.end
        } - known

    job.until(lambda: len(found()) == 2)
    return found()
