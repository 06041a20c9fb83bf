"""launch/local.sh starts the right command and refuses invalid input."""

import signal
import subprocess
import time
from pathlib import Path
from typing import TextIO

import pytest

from hypermoe_ds.process import STOP_SIGNALS
from tests.helpers.launch_scripts import LAUNCH, SYSTEM, TRAIN, ZERO1, commands, launch, stub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stub(tmp_path / "venv/bin/python", "exit 0")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "environment", "options"),
    [
        ([], {}, ["info", "--master_port", "29500"]),
        (["--verbose"], {}, ["info", "--master_port", "29500"]),
        (["--verbose"], {"HYPERMOE_LOG_LEVEL": "debug"}, ["debug", "--master_port", "29500"]),
        (["--num_gpus", "2"], {"MASTER_PORT": "7"}, ["info", "--num_gpus", "2", "--master_port", "7"]),
        (["--num_gpus=8"], {"HYPERMOE_LOG_LEVEL": "INFO"}, ["info", "--num_gpus", "8", "--master_port", "29500"]),
    ],
)
def test_local_passes_log_level_ranks_and_port_to_the_deepspeed_launcher(
    folder: Path, arguments: list[str], environment: dict[str, str], options: list[str]
) -> None:
    [start] = commands("local.sh", *arguments, "--config", "r.yaml", folder=folder, **environment)
    assert start == ["deepspeed", "--log_level", *options, TRAIN, *ZERO1, "--config", "r.yaml"]


@pytest.mark.parametrize("number", ["0", "x", "-1", ""])
def test_local_refuses_an_invalid_number_of_ranks(folder: Path, number: str) -> None:
    done = launch("local.sh", "--config", "r.yaml", f"--num_gpus={number}", folder=folder)
    assert done.stderr == f"local.sh: --num_gpus {number}: is not a number of ranks; give 1 or more\n"
    assert (done.returncode, done.stdout) == (2, "")


def test_local_checks_the_settings_before_it_starts_the_deepspeed_launcher(folder: Path) -> None:
    for name in ("python", "deepspeed"):
        stub(folder / "venv/bin" / name, f'echo "{name} ${{*: -4:4}}" >> calls; exit 2')
    assert launch("local.sh", "--config", "r.yaml", folder=folder).returncode == 2
    assert (folder / "calls").read_text() == f"python {' '.join(ZERO1)} --config r.yaml\n"


# Stand-in for DeepSpeed's launcher: it starts a child process, which starts the ranks. A signal to the launcher reaches
# neither the child nor the ranks. The rank writes to the caller's output through HYPERMOE_SCREEN and exits with code 75
# on SIGTERM.
LAUNCHER = "if [ -e silent ]; then echo $$ >started; sleep 600; fi; bash starter; exit $?"
STARTER = "bash rank & wait $!; exit $?"
RANK = """
trap 'echo "rank: saved" >>$HYPERMOE_SCREEN/3; exit 75' TERM
echo "rank: out" >>$HYPERMOE_SCREEN/3
echo "rank: error" >>$HYPERMOE_SCREEN/4
echo "rank: library"
if [ -e endless ]; then
    touch started
    while :; do sleep 0.01; done
fi
"""


@pytest.fixture
def launcher(folder: Path) -> Path:
    """Create a stub of DeepSpeed's launcher. If a file named `endless` exists, the stub's rank waits for SIGTERM."""
    stub(folder / "venv/bin/python", f"echo {folder}/run")
    stub(folder / "venv/bin/deepspeed", LAUNCHER)
    stub(folder / "starter", STARTER)
    stub(folder / "rank", RANK)
    return folder


def start(folder: Path, output: TextIO) -> "subprocess.Popen[str]":
    # Restore signals that `nohup` or `&` made the test suite ignore: bash cannot trap signals ignored at its start.
    command = ["env", "--default-signal", "bash", LAUNCH / "local.sh", "--config", "r.yaml"]
    environment = {"PATH": SYSTEM, "HOME": str(folder), "HYPERMOE_VENV": str(folder / "venv")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )


def wait_until_started(folder: Path) -> None:
    limit = time.monotonic() + 60
    while not (folder / "started").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_reaches_the_ranks_and_the_exit_code_is_theirs(launcher: Path, number: signal.Signals) -> None:
    (launcher / "endless").touch()
    with (launcher / "output").open("w") as output:
        process = start(launcher, output)
        wait_until_started(launcher)
        process.send_signal(number)
        assert process.wait(timeout=60) == 75
    assert "rank: saved" in (launcher / "output").read_text()


def test_a_stop_signal_before_the_ranks_start_ends_the_launcher(launcher: Path) -> None:
    (launcher / "silent").touch()
    with (launcher / "output").open("w") as output:
        process = start(launcher, output)
        wait_until_started(launcher)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{(launcher / 'started').read_text().strip()}").exists()


def test_later_output_of_the_caller_does_not_overwrite_the_lines_of_the_ranks(launcher: Path) -> None:
    with (launcher / "output").open("w") as output:
        output.write("before\n")
        output.flush()
        assert start(launcher, output).wait(timeout=60) == 0
        output.write("after\n")
    first, command, *ranks, last = (launcher / "output").read_text().splitlines()
    assert (first, last, sorted(ranks)) == ("before", "after", ["rank: error", "rank: out"])
    assert command.startswith("+ deepspeed ")
    assert (launcher / "run/logs/launcher.log").read_text() == "rank: library\n"
