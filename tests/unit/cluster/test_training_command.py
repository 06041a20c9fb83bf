"""Tests of TrainingCommand, which reads the command line of a job."""

from pathlib import Path

import pytest

from hypermoe_ds.cluster.training_command import TrainingCommand
from hypermoe_ds.errors import UserError


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("run:\n  dir: run\n")


@pytest.mark.parametrize(
    ("line", "run_dir", "deepspeed_config", "overrides"),
    [
        ("deepspeed --num_gpus 2 a/train.py --config r.yaml", "run", None, []),
        (
            "deepspeed a/train.py --config=r.yaml run.dir=other --deepspeed_config d.json",
            "other", "d.json", ["run.dir=other"],
        ),
        (
            "env A=1 bash launch/pdsh.sh --deepspeed_config=d.json --config r.yaml train.steps=3",
            "run", "d.json", ["train.steps=3"],
        ),
    ],
)  # fmt: skip
def test_recipe_run_folder_and_overrides_are_read_from_the_command(
    line: str, run_dir: str, deepspeed_config: str | None, overrides: list[str]
) -> None:
    command = TrainingCommand.read(line.split())
    assert command.recipe == "r.yaml"
    assert command.run_dir == Path(run_dir)
    assert command.deepspeed_config == deepspeed_config
    assert command.overrides == overrides


@pytest.mark.parametrize("line", ["deepspeed a/train.py --deepspeed_config d.json", "deepspeed a/train.py --config"])
def test_a_command_without_a_recipe_is_refused(line: str) -> None:
    with pytest.raises(UserError, match="is not a training command"):
        TrainingCommand.read(line.split())


@pytest.mark.parametrize("run", ["x", "[]", "{}", "{dir: 3}", "null", "{dir: {a: b}}"])
def test_a_recipe_without_a_run_folder_is_refused(run: str) -> None:
    Path("bare.yaml").write_text(f"run: {run}\n")
    with pytest.raises(UserError, match=r"^bare\.yaml: run\.dir: is missing; give the run folder$"):
        TrainingCommand.read(["train.py", "--config", "bare.yaml"])


def test_a_launch_gets_its_hostfile_its_overrides_and_resumes() -> None:
    command = TrainingCommand.read(["launcher", "--hostfile={hosts}", "--config", "r.yaml"])
    started = command.started_with(Path("run/hostfile"), ["parallel.expert=1"])
    words = "launcher --hostfile=run/hostfile --config r.yaml parallel.expert=1 checkpoint.resume=auto"
    assert " ".join(started) == words
