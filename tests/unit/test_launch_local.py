"""launch/local.sh starts the right command and refuses invalid input."""

from pathlib import Path

import pytest

from tests.helpers.launch_scripts import TRAIN, ZERO1, commands, launch, stub


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
