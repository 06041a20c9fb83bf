"""Test what a launch prints and records when it begins and when it ends."""

import io
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.data.shares import DatasetShare
from hypermoe_ds.errors import MachineError
from hypermoe_ds.modeling import PRESETS, HyperMoEConfig
from hypermoe_ds.monitor.console import Console
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.training.banner import banner, repetition_warnings
from hypermoe_ds.training.launches import Ended, Launch, write_end
from hypermoe_ds.training.outcome import outcome_rows, resume_command
from hypermoe_ds.training.settings import TrainConfig

REPOSITORY = Path(__file__).parents[3]
MODEL = HyperMoEConfig(**PRESETS["tiny-10m"])
DATASETS = [DatasetShare("books", 1_000_000, 0.25, 4.096), DatasetShare("web", 80_000_000, 0.75, 0.1536)]


def launch(step: int = 0, world_size: int = 2) -> Launch:
    return Launch(step, world_size, 1, asdict(MODEL.parameter_counts()), DATASETS, device="cpu")


def printed(rows: list[tuple[str, str]]) -> str:
    file = io.StringIO()
    Console(0, file).table(rows)
    return file.getvalue()


def banner_text(of_launch: Launch) -> str:
    train = TrainConfig(steps=1000, micro_batch_size=8, global_batch_size=64, precision="fp32")
    data = DataConfig.model_validate({"train": [{"prefix": "a"}], "sequence_length": 256, "tokenizer": "t"})
    return printed(banner(of_launch, MODEL, train, data, ParallelConfig(expert=2), 1, "runs/first"))


def test_banner_shows_model_layout_batch_data_and_length() -> None:
    assert banner_text(launch()) == (
        "model   10.3M parameters, 3.4M active, 590.3K in the hypernetwork; vocabulary 4,096\n"
        "layout  2 ranks on 1 host; expert parallel 2, data parallel 2; ZeRO 1; fp32\n"
        "batch   micro 8 x 2 ranks x 4 accumulated = global 64 sequences of 256 tokens; 16,384 tokens per step\n"
        "data    books    1.0M tokens   25.0%     4.10 epochs by the end\n"
        "        web     80.0M tokens   75.0%     0.15 epochs by the end\n"
        "length  1,000 steps, 16.4M tokens\n"
        "device  cpu\n"
        "run     runs/first; new run\n"
    )


def test_banner_of_a_resumed_launch_shows_its_step() -> None:
    text = banner_text(launch(step=1200, world_size=2))
    assert "run     runs/first; resumed from step 1,200\n" in text


def test_dataset_read_four_times_is_warned_about() -> None:
    [warning] = repetition_warnings(DATASETS)
    assert warning.startswith("warning: the run reads books 4.1 times (1.0M tokens): ")
    assert repetition_warnings([DatasetShare("a", 1000, 1.0, 3.999)]) == []
    assert len(repetition_warnings([DatasetShare("a", 1000, 1.0, 4.0)])) == 1


def test_launch_and_its_end_are_recorded(tmp_path: Path) -> None:
    launch(step=3).write(tmp_path)
    write_end(tmp_path, 9, "signal")
    first, second = map(json.loads, (tmp_path / "launches.jsonl").read_text().splitlines())
    assert first.keys() == {
        "time", "step", "world_size", "host", "device", "commit", "versions", "parameters", "datasets"
    }  # fmt: skip
    assert (first["step"], first["world_size"], first["device"]) == (3, 2, "cpu")
    assert first["versions"].keys() >= {"python", "torch", "deepspeed"}
    assert first["parameters"] == asdict(MODEL.parameter_counts())
    assert first["datasets"]["books"] == {"tokens": 1_000_000, "weight": 0.25, "epochs": pytest.approx(4.096)}
    assert {**second, "time": 0} == {"time": 0, "step": 9, "ended": "signal"}
    assert second["time"] >= first["time"] > 1.7e9
    with pytest.raises(MachineError, match=r"launches\.jsonl: cannot be written"):
        write_end(tmp_path / "none", 9, "finished")


def test_finished_run_shows_best_validation_and_next_commands(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    records = [{"step": 5, "valid_loss": 2.5}, {"step": 9, "loss": 1.0}, {"step": 10, "valid_loss": 2.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = outcome_rows(run, "finished", 10, 2560, 75.2, "data/valid", ["unused"])
    assert rows[:2] == [
        ("ended", "the run is finished: step 10, 2.6K tokens, after 0:01:15"),
        ("validation", "loss 2.7500 at step 10; best 2.5000 at step 5"),
    ]
    commands = {name: shlex.split(text) for name, text in rows[2:]}
    assert commands.keys() == {"evaluate", "export", "report"}
    for words in commands.values():
        assert words[0] == "python"
        assert str(run) in words
        assert words[1].rpartition("/")[2] in ("evaluate.py", "convert_to_hf.py", "report.py")
    assert commands["evaluate"][-2:] == ["--data", "data/valid"]


DEEPSPEED = ["deepspeed", "--log_level", "critical", "--num_gpus", "2"]


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"MASTER_PORT": "29500"}, [*DEEPSPEED, f"{REPOSITORY}/pretrain/train.py"]),
        ({"MASTER_PORT": "7"}, [*DEEPSPEED, "--master_port", "7", f"{REPOSITORY}/pretrain/train.py"]),
        ({"HYPERMOE_SCREEN": "/proc/1/fd"}, ["bash", f"{REPOSITORY}/launch/local.sh", "--num_gpus", "2"]),
        (
            {"HYPERMOE_SCREEN": "/proc/1/fd", "MASTER_PORT": "7"},
            ["env", "MASTER_PORT=7", "bash", f"{REPOSITORY}/launch/local.sh", "--num_gpus", "2"],
        ),
    ],
)
@pytest.mark.parametrize("ended", ["signal", "stop_at_step"])
def test_an_unfinished_run_shows_the_command_that_resumes_it_with_the_same_launcher_and_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended, variables: dict[str, str], launcher: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--local_rank=0", "--config=r.yaml", "train.stop_at_step=3", "data.train=[{prefix: a b}]"]
    command = resume_command(2, 1, [f"{REPOSITORY}/pretrain/train.py", *arguments], ended, variables)
    rows = dict(outcome_rows(tmp_path, ended, 3, 768, 9, None, command))
    assert "evaluate" not in rows
    reset = ["train.stop_at_step=null"] if ended == "stop_at_step" else []
    assert shlex.split(rows["resume"]) == [*launcher, "--config=r.yaml", "data.train=[{prefix: a b}]", *reset]


def test_the_resume_command_of_several_hosts_omits_the_launcher() -> None:
    assert resume_command(16, 2, ["train.py", "--config=r.yaml"], "signal", {}) == ["train.py", "--config=r.yaml"]
