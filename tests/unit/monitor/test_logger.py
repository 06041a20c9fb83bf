"""Test the destinations of metrics, settings and samples."""

import csv
import json
import math
import os
import shutil
import signal
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypermoe_ds.errors import MachineError, UserError
from hypermoe_ds.monitor.logger import MetricLogger
from hypermoe_ds.monitor.record_file import RecordFile
from hypermoe_ds.monitor.settings import MonitorConfig


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def board(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = board(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    folder.mkdir()
    return folder


def logger(folder: Path, rank: int = 0, resumed_step: int = 0, **config: Any) -> MetricLogger:
    return MetricLogger(MonitorConfig(**config), folder, rank, resumed_step)


# metrics.jsonl and samples.jsonl


@pytest.mark.parametrize(("resumed_step", "kept"), [(0, []), (2, [1, 2, 2]), (3, [1, 2, 2]), (9, [1, 2, 2, 4, 5])])
def test_records_of_repeated_steps_are_dropped(tmp_path: Path, resumed_step: int, kept: list[int]) -> None:
    metrics = RecordFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 2, 4, 5):
        metrics.append({"step": step, "loss": 1.5})
    metrics.drop_after(resumed_step)
    assert steps_in(tmp_path / "metrics.jsonl") == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.append({"step": resumed_step + 1})
    assert steps_in(tmp_path / "metrics.jsonl") == [*kept, resumed_step + 1]


def test_new_run_has_no_records_to_drop(tmp_path: Path) -> None:
    RecordFile(tmp_path / "metrics.jsonl").drop_after(3)
    assert list(tmp_path.iterdir()) == []


def test_numbers_keep_all_digits(tmp_path: Path) -> None:
    record = {"step": 1, "loss": 0.1 + 0.2, "lr": 1e-300}
    RecordFile(tmp_path / "metrics.jsonl").append(record)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    for value in (math.nan, math.inf, -math.inf):
        RecordFile(tmp_path / "metrics.jsonl").append({"step": 1, "loss": value, "expert_load": [0.5]})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "expert_load": [0.5]}\n' * 3


# All destinations


def test_record_has_time_values_and_loads(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.12345)
    logger(run_dir).log(3, {"loss": 2.5}, torch.tensor([[1 / 3, 2 / 3], [0.5, 0.5]]))
    assert json.loads((run_dir / "metrics.jsonl").read_text()) == {
        "step": 3, "time": 1000.123, "loss": 2.5,
        "expert_load/moe_layer_0": [0.33333, 0.66667], "expert_load/moe_layer_1": [0.5, 0.5],
    }  # fmt: skip


def test_tensorboard_has_one_chart_per_metric_and_one_run_per_item(run_dir: Path) -> None:
    values = {
        "router_entropy/moe_layer_0": 1.25, "router_entropy/moe_layer_11": 0.5, "loss": 2.5,
        "grad_norm": 1.0, "grad_norm/experts": 0.25, "unknown_metric": 7.0,
    }  # fmt: skip
    metric_logger = logger(run_dir)
    metric_logger.log(3, values)
    metric_logger.log(4, {"valid_loss": 2.25, "valid_loss/a/b": 2.5})
    folder = run_dir / "tensorboard" / "my-run"
    main = scalars(folder)
    assert main == {
        "1_loss/loss": [(3, 2.5)], "2_validation/valid_loss": [(4, 2.25)], "3_optimization/grad_norm": [(3, 1.0)],
        "9_other/unknown_metric": [(3, 7.0)],
    }  # fmt: skip
    assert next(iter(sorted(main))) == "1_loss/loss"
    lines = {path.name: scalars(path) for path in folder.iterdir() if path.is_dir()}
    assert lines == {
        "moe_layer_00": {"7_routing/router_entropy": [(3, 1.25)]},
        "moe_layer_11": {"7_routing/router_entropy": [(3, 0.5)]},
        "experts": {"3_optimization/grad_norm": [(3, 0.25)]},
        "a-b": {"2_validation/valid_loss": [(4, 2.5)]},
    }


def test_tensorboard_shows_relative_loads_as_histogram_and_image(run_dir: Path) -> None:
    loads = torch.tensor([[0.0, 0.5, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    logger(run_dir).log(3, {}, loads)
    events = board(run_dir / "tensorboard" / "my-run")
    [histogram] = events.Histograms("7_routing/expert_load_over_mean")
    assert (histogram.step, histogram.histogram_value.num) == (3, 12)
    assert (histogram.histogram_value.min, histogram.histogram_value.max) == (0, 4)
    [image] = events.Images("7_routing/expert_load_over_mean_by_layer_and_expert")
    assert (image.step, image.height, image.width) == (3, 3 * 8, 4 * 8)


def test_csv_table_has_one_row_per_record_and_one_column_per_metric(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.5)
    metric_logger = logger(run_dir, csv=True, tensorboard=False)
    metric_logger.log(1, {"loss": 2.5}, torch.ones(1, 2))
    metric_logger.log(2, {"loss": 2.25, "parameter_norm/experts": 3.0})
    metric_logger.log(2, {"valid_loss": 2.0, "valid_loss/a, b": 1.5})
    metric_logger.log(3, {"loss": math.nan})
    time = {"time": "1000.5"}
    assert rows_of(run_dir / "csv" / "train.csv") == [
        {"step": "1", **time, "loss": "2.5", "parameter_norm/experts": ""},
        {"step": "2", **time, "loss": "2.25", "parameter_norm/experts": "3.0"},
        {"step": "3", **time, "loss": "nan", "parameter_norm/experts": ""},
    ]
    assert rows_of(run_dir / "csv" / "validation.csv") == [
        {"step": "2", **time, "valid_loss": "2.0", "valid_loss/a, b": "1.5"}
    ]


def test_tensorboard_shows_the_launch_and_samples_as_texts(run_dir: Path) -> None:
    metric_logger = logger(run_dir, resumed_step=2)
    metric_logger.log_launch({"run": {"dir": "x"}, "model": None}, {"torch": "2.13", "git_commit": "abc"})
    metric_logger.log_samples(4, [("Once\nupon", " a </script> time"), ("def", "")])
    events = board(run_dir / "tensorboard" / "my-run")
    texts = {
        tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert texts == {
        "recipe/text_summary": [(2, "```yaml\nrun:\n  dir: x\nmodel: null\n```")],
        "versions/text_summary": [(2, "```yaml\ntorch: '2.13'\ngit_commit: abc\n```")],
        "sample/0/text_summary": [
            (4, "Prompt:\n\n    Once\n    upon\n\nContinuation:\n\n     a </script> time"),
        ],
        "sample/1/text_summary": [(4, "Prompt:\n\n    def\n\nContinuation:\n\n    ")],
    }
    assert [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()] == [
        {"step": 4, "prompt": "Once\nupon", "text": " a </script> time"},
        {"step": 4, "prompt": "def", "text": ""},
    ]


def test_disabled_destinations_are_not_written(run_dir: Path) -> None:
    metric_logger = logger(run_dir, tensorboard=False)
    metric_logger.log(1, {"loss": 2.5}, torch.ones(1, 2))
    metric_logger.log_launch({}, {})
    metric_logger.log_samples(1, [])
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(run_dir: Path) -> None:
    metric_logger = logger(run_dir, rank=1, csv=True)
    metric_logger.log(1, {"loss": 2.5}, torch.ones(1, 2))
    metric_logger.log_launch({}, {})
    metric_logger.log_samples(1, [("a", "b")])
    assert list(run_dir.iterdir()) == []


# After a crash


def test_every_file_has_each_step_once_after_a_crash(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for resumed, last in ((0, 8), (5, 8), (8, 9)):
        # TensorBoard names event files by the second and reads them in the order of their names.
        monkeypatch.setattr("time.time", lambda now=1e9 + resumed: now)
        metric_logger = logger(run_dir, resumed_step=resumed, csv=True)
        for step in range(resumed + 1, last + 1):
            loss = resumed + step / 16
            metric_logger.log(step, {"loss": loss, "router_entropy/moe_layer_0": loss}, torch.ones(1, 2))
            metric_logger.log_samples(step, [("a", str(resumed))])
    losses = [(step, step / 16 + (0 if step <= 5 else 5 if step <= 8 else 8)) for step in range(1, 10)]
    assert steps_in(run_dir / "metrics.jsonl") == steps_in(run_dir / "samples.jsonl") == list(range(1, 10))
    folder = run_dir / "tensorboard" / "my-run"
    assert scalars(folder) == {"1_loss/loss": losses}
    assert scalars(folder / "moe_layer_00") == {"7_routing/router_entropy": losses}
    assert [event.step for event in board(folder).Histograms("7_routing/expert_load_over_mean")] == list(range(1, 10))
    rows = rows_of(run_dir / "csv" / "train.csv")
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == losses


def test_tensorboard_drops_repeated_steps_of_metrics_that_are_no_longer_logged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = logger(run_dir)
    for step in (1, 2, 3):
        first.log(step, {"valid_loss/old": 1.0})
    monkeypatch.setattr("time.time", lambda: 2e9)
    logger(run_dir, resumed_step=1).log(2, {"valid_loss/new": 2.0})
    folder = run_dir / "tensorboard" / "my-run"
    assert scalars(folder / "old") == {"2_validation/valid_loss": [(1, 1.0)]}
    assert scalars(folder / "new") == {"2_validation/valid_loss": [(2, 2.0)]}


def _log_and_die(folder: Path) -> None:
    metric_logger = logger(folder, csv=True)
    metric_logger.log_launch({"run": {}}, {"torch": "2"})
    for step in range(1, 6):
        metric_logger.log(step, {"loss": float(step), "grad_norm/experts": 1.0}, torch.ones(2, 4))
    os.kill(os.getpid(), signal.SIGKILL)


def test_logs_of_a_killed_process_are_complete(run_dir: Path) -> None:
    process = get_context("fork").Process(target=_log_and_die, args=(run_dir,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = run_dir / "tensorboard" / "my-run"
    assert scalars(folder) == {"1_loss/loss": [(step, float(step)) for step in range(1, 6)]}
    assert [step for step, _ in scalars(folder / "experts")["3_optimization/grad_norm"]] == [1, 2, 3, 4, 5]
    assert len(board(folder).Histograms("7_routing/expert_load_over_mean")) == 5
    assert steps_in(run_dir / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows_of(run_dir / "csv" / "train.csv")] == ["1", "2", "3", "4", "5"]


def test_csv_column_with_a_comma_survives_a_resume(run_dir: Path) -> None:
    for resumed in (0, 1):
        metric_logger = logger(run_dir, resumed_step=resumed, csv=True, tensorboard=False)
        metric_logger.log(resumed + 1, {"valid_loss": 2.0, "valid_loss/a, b": 1.5 + resumed})
    rows = rows_of(run_dir / "csv" / "validation.csv")
    assert [(row["step"], row["valid_loss/a, b"]) for row in rows] == [("1", "1.5"), ("2", "2.5")]


# Damaged files


@pytest.mark.parametrize(
    "damage", [b"3", b"step,time,loss\r\n", b"3,1.0\r\n", b"\xff\xfe\n", b"\n\n", b"\0" * 200, b'"' + b"1" * 200_000]
)
def test_damaged_csv_file_loses_only_its_damaged_rows(run_dir: Path, damage: bytes) -> None:
    (run_dir / "csv").mkdir()
    (run_dir / "csv" / "train.csv").write_bytes(b"step,time,loss\r\n1,1.0,1.5\r\n3,1.0,3.5\r\n" + damage)
    (run_dir / "csv" / "validation.csv").write_bytes(damage)
    metric_logger = logger(run_dir, resumed_step=3, csv=True, tensorboard=False)
    metric_logger.log(4, {"loss": 4.5})
    metric_logger.log(4, {"valid_loss": 0.5})
    rows = rows_of(run_dir / "csv" / "train.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [("1", "1.5"), ("3", "3.5"), ("4", "4.5")]
    [row] = rows_of(run_dir / "csv" / "validation.csv")
    assert (row["step"], row["valid_loss"]) == ("4", "0.5")


@pytest.mark.parametrize(
    ("name", "is_folder"), [("metrics.jsonl", True), ("samples.jsonl", True), ("tensorboard", False), ("csv", False)]
)
def test_unusable_log_path_is_named(run_dir: Path, name: str, is_folder: bool) -> None:
    (run_dir / name).mkdir() if is_folder else (run_dir / name).touch()
    with pytest.raises(UserError, match=rf"{run_dir}/{name}.*: cannot be read or written \(.*\); move it"):
        logger(run_dir, resumed_step=3, csv=True)


def test_disk_failure_is_reported_in_one_line(run_dir: Path) -> None:
    metric_logger = logger(run_dir, tensorboard=False)
    shutil.rmtree(run_dir)
    with pytest.raises(MachineError, match=r"/my-run/metrics\.jsonl: cannot be written \(No such file or directory\)$"):
        metric_logger.log(1, {"loss": 1.0})


# Weights & Biases


class Wandb:
    """Stand-in for the package wandb."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}

    def init(self, **arguments: Any) -> Any:
        self.started.append(arguments)
        config = SimpleNamespace(update=lambda values, allow_val_change: self.config.update(values))
        run_id = arguments["id"] or "new-id"
        return SimpleNamespace(id=run_id, config=config, log=lambda values, step: self.logged.append((step, values)))

    def Histogram(self, values: list[float]) -> tuple[str, list[float]]:  # noqa: N802 (as in wandb)
        return "histogram", values

    def Table(self, columns: list[str], rows: list[list[Any]]) -> Any:  # noqa: N802 (as in wandb)
        return columns, rows


def test_wandb_groups_metrics_by_page_and_resume_continues_its_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metric_logger = logger(run_dir, wandb_project="p", tensorboard=False)
    metric_logger.log_launch({"train": {"steps": 3}}, {"torch": "2"})
    metric_logger.log(3, {"loss": 1.5, "router_entropy/moe_layer_0": 0.5}, torch.tensor([[0.25, 0.75]]))
    metric_logger.log_samples(3, [("a", "b")])
    logger(run_dir, rank=1, wandb_project="p").log(3, {"loss": 1.5})
    logger(run_dir, resumed_step=3, wandb_project="p", tensorboard=False)
    common = {"project": "p", "name": "my-run", "resume": "allow", "dir": str(run_dir)}
    assert wandb.started == [{**common, "id": None}, {**common, "id": "new-id"}]
    assert wandb.config == {"train": {"steps": 3}, "versions": {"torch": "2"}}
    assert wandb.logged == [
        (
            3,
            {
                "loss/loss": 1.5,
                "routing/router_entropy/moe_layer_0": 0.5,
                "routing/expert_load/moe_layer_0": ("histogram", [0.25, 0.75]),
            },
        ),
        (3, {"samples": (["step", "prompt", "text"], [[3, "a", "b"]])}),
    ]
