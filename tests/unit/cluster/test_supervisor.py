"""Test the supervisor with jobs that are short Python scripts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SUPERVISE = Path(__file__).parents[3] / "launch/supervise.py"
JOB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

def beat(**changes):  # writes a heartbeat as a rank does
    heartbeat = dict(rank=0, host=os.uname().nodename, process=os.getpid(), step=3, doing="", passed=1, beats=1)
    Path("run/watch").mkdir(parents=True, exist_ok=True)
    Path("run/watch/rank_00000.json").write_text(json.dumps(heartbeat | changes))

assert sys.argv[-1] == "checkpoint.resume=auto"
with open("launches", "a") as file:
    file.write("x")
launch = Path("launches").stat().st_size
"""


def supervised(
    folder: Path, job: str, *options: str, dispositions: str = "--default-signal"
) -> "subprocess.Popen[str]":
    """Start a supervisor with the given job.

    By default, the supervisor inherits no ignored signals, even if the tests run in the background.
    """
    (folder / "train.py").write_text(JOB + job)
    (folder / "r.yaml").write_text("run:\n  dir: run\n")
    command = ["env", "RANK=0", sys.executable, str(folder / "train.py"), "--config", "r.yaml"]
    return subprocess.Popen(
        ["env", f"{dispositions}=INT,HUP", sys.executable, str(SUPERVISE), *options, "--", *command],
        cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(SUPERVISE.parents[1])},
    )  # fmt: skip


def outcome(process: "subprocess.Popen[str]", folder: Path) -> tuple[int, list[str]]:
    """Wait for a supervisor to end, and return its exit code and the outcome of each attempt."""
    process.communicate(timeout=60)
    history = [json.loads(line) for line in (folder / "run/supervisor.jsonl").read_text().splitlines()]
    return process.returncode, [entry["outcome"] for entry in history]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("beat(end='done'); sys.exit(0)", (0, ["done"])),
        ("beat(end='saved' if launch < 3 else 'done'); sys.exit(75 * (launch < 3))", (0, ["saved", "saved", "done"])),
        ("sys.exit(2)", (2, ["refused"])),
        ("beat(); os.kill(os.getpid(), 9 * (launch < 3)); sys.exit(0)", (0, ["lost", "lost", "done"])),
        ("beat(end='error', error=f'KeyError: {launch}'); sys.exit(1)", (1, ["error", "error"])),
        ("sys.exit(1)", (1, ["unmet"] * 3)),
        ("beat(); sys.exit(76)", (76, ["lost"] * 5)),
    ],
)
def test_a_job_is_restarted_only_while_a_restart_can_help(
    job: str, expected: tuple[int, list[str]], tmp_path: Path
) -> None:
    assert outcome(supervised(tmp_path, job, "--max-restarts", "4"), tmp_path) == expected


def test_heartbeats_of_an_earlier_attempt_are_ignored(tmp_path: Path) -> None:
    job = "beat(end='error', error='KeyError') if launch == 1 else None; sys.exit(1)"
    assert outcome(supervised(tmp_path, job), tmp_path) == (1, ["error"] + ["unmet"] * 3)


def test_remaining_processes_of_an_attempt_are_ended_before_the_next(tmp_path: Path) -> None:
    job = """
if launch == 1:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path("left").write_text(str(left.pid))
    beat(); sys.exit(1)
import psutil
try:
    sys.exit(int(psutil.Process(int(Path("left").read_text())).status() != "zombie"))
except psutil.NoSuchProcess:
    sys.exit(0)
"""
    assert outcome(supervised(tmp_path, job), tmp_path) == (0, ["lost", "done"])


# A job that saves on SIGTERM, ignores SIGINT, and ends when a file named `over` exists.
SAVES = """
def end(number, frame):
    beat(end='saved')
    os._exit(75)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, signal.SIG_IGN)
beat()
Path("ready").touch()
while not Path("over").exists():
    time.sleep(0.02)
beat(end='done')
"""


def signalled(folder: Path, number: signal.Signals, dispositions: str) -> "subprocess.Popen[str]":
    """Start a supervisor, and send it the given signal while its job runs."""
    process = supervised(folder, SAVES, dispositions=dispositions)
    while not (folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_after_a_signal_the_ranks_save_and_job_and_supervisor_end(number: signal.Signals, tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    assert outcome(signalled(tmp_path, number, "--default-signal"), tmp_path) == (75, ["saved"])
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_background_supervisor_ignores_signals_of_the_terminal(number: signal.Signals, tmp_path: Path) -> None:
    process = signalled(tmp_path, number, "--ignore-signal")
    (tmp_path / "over").touch()
    assert outcome(process, tmp_path) == (0, ["done"])


# Replacement for tools/preflight.py. The second call finds no host; every other call finds a different host.
PREFLIGHT = """
import json, sys
from pathlib import Path
with open("calls", "a") as file:
    file.write("x")
calls = Path("calls").stat().st_size
if calls == 2:
    sys.exit(2)
assert sys.argv[1:6] == ["--hostfile", "all", "--config", "r.yaml", "--deepspeed_config"]
hosts = [f"node{calls} slots=1"]
Path(sys.argv[sys.argv.index("--fit") + 1]).write_text(json.dumps({"hosts": hosts, "overrides": ["parallel.expert=1"]}))
"""
WITH_HOSTS = """
import sys
from pathlib import Path
from hypermoe_ds.cluster import supervisor
from hypermoe_ds.cluster.training_command import TrainingCommand
from hypermoe_ds.cluster.attempts import Limits
from hypermoe_ds.cluster.host_selection import HostSelector

supervisor._FIRST_PAUSE = 0.1
command = TrainingCommand.read(sys.argv[1:])
choice = HostSelector(Path("all"), command, [sys.executable, "preflight.py"], "zero1.json")
choice.hosts = []
sys.exit(supervisor.Supervisor(command, Limits(4, 100), choice).run())
"""


def with_hosts(folder: Path, job: str, *words: str) -> "subprocess.CompletedProcess[str]":
    for name, text in (("preflight.py", PREFLIGHT), ("supervise.py", WITH_HOSTS), ("train.py", JOB + job)):
        (folder / name).write_text(text)
    (folder / "r.yaml").write_text("run:\n  dir: run\n")
    (folder / "all").write_text("node1 slots=1\nnode2 slots=1\n")
    command = [sys.executable, "supervise.py", sys.executable, "train.py", "--config", "r.yaml", *words]
    environment = {**os.environ, "PYTHONPATH": str(SUPERVISE.parents[1])}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False, timeout=60)


def test_each_attempt_runs_on_the_hosts_that_pass_and_waits_until_one_passes(tmp_path: Path) -> None:
    job = """
print(Path(sys.argv[-3]).read_text(), sys.argv[-2], flush=True)
beat(); sys.exit(76 * (launch < 2))
"""
    done = with_hosts(tmp_path, job, "{hosts}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("node")] == ["node1 slots=1", "node3 slots=1"]
    assert lines.count(" parallel.expert=1") == 2
    assert "supervisor: no host can train; checking again in 0 s" in lines


def test_nothing_is_started_if_no_host_passes_at_first(tmp_path: Path) -> None:
    (tmp_path / "calls").write_text("x")
    done = with_hosts(tmp_path, "", "{hosts}")
    assert (done.returncode, (tmp_path / "launches").exists()) == (1, False)
    assert done.stderr.splitlines()[-1].endswith("no host can train; fix the problems listed above")


def test_a_command_without_a_hostfile_placeholder_is_refused(tmp_path: Path) -> None:
    done = with_hosts(tmp_path, "")
    assert done.stderr.splitlines()[-1].endswith("write --hostfile {hosts} into the command after --")


MISSING = "supervise.py: `-- COMMAND` is missing; write -- and the training command last"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("", MISSING),
        ("--max-restarts 3 --", MISSING),
        ("deepspeed --num_gpus 2 train.py --config r.yaml", MISSING),
        ("--bogus 3 -- deepspeed train.py --config r.yaml", "supervise.py: --bogus: is not an option; see --help"),
        ("--max-restarts -1 -- deepspeed", "--max-restarts -1: is negative; give 0 or more"),
        ("--window 0 -- deepspeed", "--window 0: is not positive; give a time in seconds"),
        ("--window -5 -- deepspeed", "--window -5: is not positive; give a time in seconds"),
        ("--window nan -- deepspeed", "--window nan: is not positive; give a time in seconds"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(words: str, answer: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SUPERVISE.parents[1])}
    command = [sys.executable, str(SUPERVISE), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {answer}\n")


def test_a_missing_command_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("run: {dir: run}")
    command = [sys.executable, str(SUPERVISE), "--", "no-such-launcher", "train.py", "--config", "r.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(SUPERVISE.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: no-such-launcher: cannot be started (No such file or directory); correct the command after --\n",
    )
