"""Where a run's numbers go."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypermoe_ds.errors import MachineError, UserError
from hypermoe_ds.monitor.logger import MetricLogger, MetricsFile
from hypermoe_ds.monitor.settings import MonitorConfig


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("after", "left"), [(0, []), (2, [1, 2, 2]), (3, [1, 2, 2, 4][:3]), (9, [1, 2, 2, 4, 5])])
def test_records_of_steps_to_come_again_are_dropped(tmp_path: Path, after: int, left: list[int]) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 2, 4, 5):
        metrics.append({"step": step, "loss": 1.5})
    metrics.drop_after(after)
    assert steps_in(tmp_path / "metrics.jsonl") == left
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.append({"step": after + 1})
    assert steps_in(tmp_path / "metrics.jsonl") == [*left, after + 1]


def test_a_new_run_has_no_records_to_drop(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").drop_after(3)
    assert list(tmp_path.iterdir()) == []


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    record = {"step": 1, "loss": 0.1 + 0.2, "lr": 1e-300}
    MetricsFile(tmp_path / "metrics.jsonl").append(record)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record


def test_what_is_not_finite_is_null_for_json_has_no_word_for_it(tmp_path: Path) -> None:
    for value in (math.nan, math.inf, -math.inf):
        MetricsFile(tmp_path / "metrics.jsonl").append({"step": 1, "loss": value, "expert_load": [0.5]})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "expert_load": [0.5]}\n' * 3


def logger(folder: Path, rank: int = 0, resumed_step: int = 0, **config: Any) -> MetricLogger:
    return MetricLogger(MonitorConfig(**config), folder, rank, resumed_step)


def test_each_number_goes_to_the_file_and_under_its_group_to_tensorboard_and_csv(tmp_path: Path) -> None:
    written = logger(tmp_path, csv=True)
    loads = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    written.log(3, {"loss": 2.5, "router_entropy/moe_layer_0": 1.25}, loads)
    written.log(4, {"valid_loss": 2.25})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 3, "loss": 2.5, "router_entropy/moe_layer_0": 1.25, '
        '"expert_load/moe_layer_0": [0.25, 0.75], "expert_load/moe_layer_1": [0.5, 0.5]}',
        '{"step": 4, "valid_loss": 2.25}',
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    expected = {
        "train/loss": [(3, 2.5)], "router_entropy/moe_layer_0": [(3, 1.25)], "valid/valid_loss": [(4, 2.25)],
    }  # fmt: skip
    assert {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]} == expected
    assert board.Tags()["histograms"] == ["expert_load/moe_layer_0", "expert_load/moe_layer_1"]
    assert board.Histograms("expert_load/moe_layer_0")[0].histogram_value.sum == pytest.approx(1)
    assert len(list((tmp_path / "csv").rglob("*.csv"))) == 3


def test_what_is_switched_off_is_not_written(tmp_path: Path) -> None:
    written = logger(tmp_path, tensorboard=False)
    written.log(1, {"loss": 2.5}, torch.ones(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    written = logger(tmp_path, rank=1, csv=True)
    written.log(1, {"loss": 2.5}, torch.ones(1, 2))
    assert list(tmp_path.iterdir()) == []


def test_after_a_crash_each_step_stands_once_in_every_file(tmp_path: Path) -> None:
    for resumed, last in ((0, 8), (5, 8), (8, 9)):
        written = logger(tmp_path, resumed_step=resumed, csv=True)
        for step in range(resumed + 1, last + 1):
            written.log(step, {"loss": resumed + step / 16, "z/layer_0": 1.0}, torch.ones(1, 2))
    losses = [(step, step / 16 + (0 if step <= 5 else 5 if step <= 8 else 8)) for step in range(1, 10)]
    assert steps_in(tmp_path / "metrics.jsonl") == list(range(1, 10))
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == losses
    assert [event.step for event in board.Histograms("expert_load/moe_layer_0")] == list(range(1, 10))
    expected = ["step,loss", *(f"{step},{loss}" for step, loss in losses)]
    assert (tmp_path / "csv" / "train_loss.csv").read_text().splitlines() == expected
    assert (tmp_path / "csv" / "z_layer_0.csv").read_text().count("step") == 1


def test_a_csv_row_that_was_cut_off_and_headers_within_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train_loss.csv").write_text("step,loss\n1,1.5\nstep,loss\n2,2.5\n3,3.5\n3")
    (tmp_path / "csv" / "train_lr.csv").write_text("")
    logger(tmp_path, resumed_step=3, csv=True).log(4, {"loss": 4.5, "lr": 0.5})
    assert (tmp_path / "csv" / "train_loss.csv").read_text().split() == [
        "step,loss",
        "1,1.5",
        "2,2.5",
        "3,3.5",
        "4,4.5",
    ]
    assert (tmp_path / "csv" / "train_lr.csv").read_text().split()[1:] == ["4,0.5"]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"\n\n", b"\0" * 200, b'"' + b"1" * 200_000])
def test_a_damaged_csv_file_loses_the_damaged_rows_alone(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train_loss.csv").write_bytes(b"step,loss\n1,1.5\n" + damage)
    (tmp_path / "csv" / "train_lr.csv").write_bytes(damage)
    logger(tmp_path, resumed_step=3, csv=True).log(4, {"loss": 4.5, "lr": 0.5})
    assert (tmp_path / "csv" / "train_loss.csv").read_text().split() == ["step,loss", "1,1.5", "4,4.5"]
    assert (tmp_path / "csv" / "train_lr.csv").read_text().split() == ["step,train_lr", "4,0.5"]


@pytest.mark.parametrize(("name", "is_folder"), [("metrics.jsonl", True), ("tensorboard", False), ("csv", False)])
def test_something_else_in_the_place_of_a_log_is_named(tmp_path: Path, name: str, is_folder: bool) -> None:
    (tmp_path / name).mkdir() if is_folder else (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{tmp_path}/{name}: cannot be read or written \(.*\); move it away"):
        logger(tmp_path, resumed_step=3, csv=True)


def test_weights_and_biases_gets_the_numbers_of_a_step_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(log=lambda scalars, step: logged.append((step, scalars)))
    wandb = SimpleNamespace(init=lambda project: logged.append(project) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger(tmp_path, wandb_project="p", tensorboard=False).log(3, {"loss": 1.5, "valid_loss": 2.5})
    logger(tmp_path, rank=1, wandb_project="p").log(3, {"loss": 1.5})
    assert logged == ["p", (3, {"train/loss": 1.5, "valid/valid_loss": 2.5})]


def test_a_disk_that_is_full_or_gone_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    written = logger(tmp_path / "run", tensorboard=False)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(MachineError, match=r"/run/metrics\.jsonl: cannot be written \(No such file or directory\)$"):
        written.log(1, {"loss": 1.0})
