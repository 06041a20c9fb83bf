"""The supervisor, with jobs that are a few lines of Python."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hypermoe_ds.errors import UserError
from hypermoe_ds.supervision.supervisor import run_dir_of

SUPERVISE = Path(__file__).parents[3] / "launch/supervise.py"
JOB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

def sign(**changes):  # as a rank does
    sign = dict(rank=0, host=os.uname().nodename, process=os.getpid(), step=3, doing="", passed=1, beats=1)
    Path("run/watch").mkdir(parents=True, exist_ok=True)
    Path("run/watch/rank_00000.json").write_text(json.dumps(sign | changes))

assert sys.argv[-1] == "checkpoint.resume=auto"
with open("starts", "a") as file:
    file.write("x")
start = Path("starts").stat().st_size
"""


def supervised(folder: Path, job: str, *options: str, words: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    (folder / "train.py").write_text(JOB + job)
    (folder / "r.yaml").write_text("run:\n  dir: run\n")
    command = [sys.executable, str(folder / "train.py"), "--config", "r.yaml", *words]
    return subprocess.Popen(
        [sys.executable, str(SUPERVISE), *options, "--", *command],
        cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(SUPERVISE.parents[1])},
    )  # fmt: skip


def outcome(process: "subprocess.Popen[str]", folder: Path) -> tuple[int, list[str]]:
    """The exit code and how each try ended."""
    process.communicate(timeout=60)
    history = [json.loads(line) for line in (folder / "run/supervisor.jsonl").read_text().splitlines()]
    return process.returncode, [entry["outcome"] for entry in history]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("sign(end='done'); sys.exit(0)", (0, ["done"])),
        ("sign(end='saved'); sys.exit(75 * (start < 3))", (0, ["saved", "saved", "done"])),
        ("sys.exit(2)", (2, ["refused"])),
        ("sign(); os.kill(os.getpid(), 9 * (start < 3)); sys.exit(0)", (0, ["lost", "lost", "done"])),
        ("sign(end='error', error=f'KeyError: {start}'); sys.exit(1)", (1, ["error", "error"])),
        ("sys.exit(1)", (1, ["untrained"] * 3)),
        ("sign(); sys.exit(76)", (76, ["lost"] * 5)),
    ],
)
def test_a_job_is_started_again_while_that_may_help(job: str, expected: tuple[int, list[str]], tmp_path: Path) -> None:
    assert outcome(supervised(tmp_path, job, "--max-restarts", "4"), tmp_path) == expected


def test_signs_of_an_earlier_try_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    job = "sign(end='error', error='KeyError') if start == 1 else None; sys.exit(1)"
    assert outcome(supervised(tmp_path, job), tmp_path) == (1, ["error"] + ["untrained"] * 3)


def test_what_a_try_leaves_behind_is_ended_before_the_next(tmp_path: Path) -> None:
    job = """
if start == 1:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path("left").write_text(str(left.pid))
    sign(); sys.exit(1)
sys.exit(int(Path(f"/proc/{Path('left').read_text()}").exists()))
"""
    assert outcome(supervised(tmp_path, job), tmp_path) == (0, ["lost", "done"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_passed_on_to_a_rank_and_ends_it_all(number: signal.Signals, tmp_path: Path) -> None:
    job = """
def end(number, frame):
    sign(end='saved')
    print(number, flush=True)
    os._exit(75)
signal.signal(int(sys.argv[-2]), end)
sign()
Path("ready").touch()
time.sleep(1000)
"""
    before = set(psutil.Process().children())
    process = supervised(tmp_path, job, words=(str(int(number)),))
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert outcome(process, tmp_path) == (75, ["saved"])
    assert set(psutil.Process().children()) <= before


def test_the_hosts_of_each_try_are_what_the_command_prints(tmp_path: Path) -> None:
    (tmp_path / "hosts.sh").write_text("echo node$(wc -c < starts) slots=1")
    (tmp_path / "starts").touch()
    job = "print(Path(sys.argv[-2]).read_text(), end='', flush=True); sign(); sys.exit(76 * (start < 2))"
    process = supervised(tmp_path, job, "--hosts-command", "bash hosts.sh", words=("{hosts}",))
    told, _ = process.communicate(timeout=60)
    assert [line for line in told.splitlines() if line.startswith("node")] == ["node0 slots=1", "node1 slots=1"]
    assert process.returncode == 0


def test_a_command_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("run: {dir: run}")
    command = [sys.executable, str(SUPERVISE), "--", "no-such-launcher", "train.py", "--config", "r.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(SUPERVISE.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: no-such-launcher: cannot be started (No such file or directory); mend the command after --\n",
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["deepspeed", "--num_gpus", "2", "a/train.py", "--config", "r.yaml"], "run"),
        (["deepspeed", "a/train.py", "--config=r.yaml", "run.dir=other", "--deepspeed_config", "d.json"], "other"),
        (["deepspeed", "a/train.py", "--deepspeed_config", "d.json"], None),
        (["deepspeed", "--config", "r.yaml"], None),
    ],
)
def test_the_run_folder_is_read_off_the_command(
    words: list[str], expected: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("run:\n  dir: run\n")
    if expected is None:
        with pytest.raises(UserError, match="is no training command"):
            run_dir_of(words)
    else:
        assert run_dir_of(words) == Path(expected)
