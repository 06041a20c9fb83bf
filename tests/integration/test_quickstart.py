"""Run the quickstart as a new user does, with fewer files, fewer steps and a smaller model."""

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = 12
SHORTER = (
    f"train.steps={STEPS}",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "schedule.warmup_steps=2",
    "checkpoint.interval=6",
    "evaluation.interval=6",
    "monitor.interval=2",
    "data.sequence_length=128",
    "model.num_hidden_layers=2",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the quickstart; return its folder and output."""
    folder = tmp_path_factory.mktemp("quickstart")
    environment = {**os.environ, "QUICKSTART_DIR": str(folder), "QUICKSTART_EVERY": "8"}
    command = ["bash", str(REPOSITORY / "launch" / "quickstart.sh"), *SHORTER]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder, result.stdout


def test_the_quickstart_trains_validates_saves_and_exports(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert f"step {STEPS}/{STEPS}  loss" in output
    assert (folder / "run" / "checkpoints" / "latest").read_text().strip() == f"step_{STEPS:08d}"
    assert list((folder / "run" / "tensorboard").glob("run/events.out.tfevents.*"))
    assert (folder / "hf" / "model.safetensors").is_file()
    assert "def read_lines(path):" in output


def test_the_quickstart_prints_its_results(finished: tuple[Path, str]) -> None:
    folder, output = finished
    rows = dict(re.findall(r"^(steps|tokens|validation loss|unigram loss|run folder) +(.+)$", output, re.M))
    assert rows["steps"] == str(STEPS)
    assert rows["tokens"] == f"{STEPS * 8 * 128:,}"
    assert rows["run folder"] == str(folder / "run")
    validations = [float(loss) for loss in re.findall(r"valid \S+ +loss +([\d.]+)", output)]
    assert len(validations) == 2
    assert float(rows["validation loss"].split()[0]) == pytest.approx(validations[-1], abs=1e-3)
    assert validations[1] < validations[0]
    assert 4.0 < float(rows["unigram loss"].split()[0]) < 8.0
