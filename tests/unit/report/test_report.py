"""Test the report of runs: its numbers, its page and its command."""

import base64
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from hypermoe_ds.errors import UserError
from hypermoe_ds.monitor.metrics import METRICS, PAGES
from hypermoe_ds.report.page import bins_per_run, build_page
from hypermoe_ds.report.reading import flat, labels, read_run
from hypermoe_ds.report.summary import differing_settings, restarts, summary, trained_seconds
from tests.helpers.synthetic_runs import write_run

REPOSITORY = Path(__file__).parents[3]
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "second", steps=1500, seed=1, lr=3e-4)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def data_of(page: str) -> Any:
    [text] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_summary_matches_the_records(run_dir: Path) -> None:
    all_records = records(run_dir)
    valid = {record["step"]: record["valid_loss"] for record in all_records if "valid_loss" in record}
    best = min(valid, key=lambda step: valid[step])
    found = summary(read_run(run_dir, "first", 10))
    assert found["validation loss, last"] == f"{valid[2000]:.4f} nats/token"
    assert found["validation loss, best"] == f"{valid[best]:.4f} nats/token at step {best:,}"
    assert found["step"] == "2,000"
    assert found["tokens"] == "2.0M"
    for name, key, form in (("tokens/s, median", "tokens_per_second", ",.0f"), ("MFU, median", "mfu", ".1%")):
        assert found[name] == format(statistics.median(record[key] for record in all_records if key in record), form)
    assert found["restarts"] == "from step 1,000: lost, rank 3 hung"
    assert found["time, first to last record"] == "2:39:30"
    assert found["ranks"] == "8 x NVIDIA H100"


def test_trained_time_excludes_pauses(run_dir: Path) -> None:
    assert trained_seconds(read_run(run_dir, "first", 10)) == pytest.approx(3 * (2000 - 10), rel=0.02)


def test_restarts_name_why_the_previous_launch_ended(run_dir: Path) -> None:
    run = read_run(run_dir, "first", 10)
    times = {0: 0, 100: 0, 200: 20, 300: 20, 400: 30, 500: 40}  # maps the time of each launch to its first step
    run.launches[:] = [{"time": time, "step": step} for time, step in times.items()]
    run.launches.insert(4, {"time": 390, "step": 30, "ended": "stop_at_step"})
    ends = {90: ("unmet", None), 190: ("lost", 25), 290: ("error", 25), 600: ("lost", 45)}
    run.attempts[:] = [
        {"began": end - 80, "seconds": 80, "outcome": outcome, "step": step, "what": f"at {end}"}
        for end, (outcome, step) in ends.items()
    ]
    assert restarts(run) == [
        "from step 0: unmet, at 90",
        "from step 20: lost, at 190",
        "from step 20: error, at 290",
        "from step 30: stop_at_step",
        "from step 40",
    ]
    run.launches[:] = [{"step": None}, {"time": 1, "step": 3}]
    assert restarts(run) == []


def test_differing_settings_match_a_plain_comparison(run_dir: Path, other_dir: Path) -> None:
    runs = [read_run(folder, folder.name, 10) for folder in (run_dir, other_dir)]
    first, second = (run.settings for run in runs)
    expected = [(key, [first[key], second[key]]) for key in sorted(first) if first[key] != second[key]]
    assert differing_settings(runs) == expected
    assert [key for key, _ in expected] == ["optimizer.lr", "run.dir"]
    del second["optimizer.beta1"]
    assert ("optimizer.beta1", ["0.9", ""]) in differing_settings(runs)
    assert flat({"a": {"b": [1, {"c": 2}]}, "d": {}}) == {"a.b": '[1, {"c": 2}]', "d": "{}"}


def test_runs_with_the_same_name_have_distinct_labels() -> None:
    assert labels([Path("/x/a/run"), Path("/x/b/run"), Path("/y/c")]) == ["a/run", "b/run", "c"]
    assert labels([Path("/x/a")] * 3) == ["a", "a (2)", "a (3)"]


def test_page_has_every_metric_and_needs_no_other_file(run_dir: Path, other_dir: Path) -> None:
    page = build_page([read_run(folder, folder.name, bins_per_run(2)) for folder in (run_dir, other_dir)])
    assert re.findall(r"(?:src|href)=[\"'](?!#|data:)[^\"']+", page) == []
    assert re.findall(r"@import|url\((?!data:)", page) == []
    assert len(re.findall(r"</script>", page)) == 3, "the text of a sample closed a script element"
    data = data_of(page)
    assert list(data["pages"])[:-1] == list(PAGES)
    for run in data["runs"]:
        keys = set(chain.from_iterable(group["curves"] for group in run["groups"]))
        names = {key.partition("/")[0] for key in keys} | {"expert_load", "consumed_tokens"}
        assert names == {metric.name for metric in METRICS}
        for group in run["groups"]:
            assert {len(values) for values in group["curves"].values()} == {len(group["step"])}
            assert group["step"] == sorted(set(group["step"]))
            assert len(group["tokens"]) == len(group["hours"]) == len(group["step"])
    assert data["runs"][0]["samples"][0] == [2000, "Once upon", " a time </script><b>2000</b>"]
    assert data["runs"][0]["resumed"] == [1000]


def test_curves_and_loads_match_the_records(run_dir: Path) -> None:
    [run] = data_of(build_page([read_run(run_dir, "first", 300)]))["runs"]
    training = [record for record in records(run_dir) if "loss" in record]
    [group] = [group for group in run["groups"] if "loss" in group["curves"]]
    assert group["step"] == [record["step"] for record in training]
    assert group["curves"]["loss"] == pytest.approx([record["loss"] for record in training], rel=1e-4)
    assert group["tokens"] == pytest.approx([record["consumed_tokens"] / 1e6 for record in training], rel=1e-6)
    assert group["hours"] == pytest.approx([(r["time"] - training[0]["time"]) / 3600 for r in training], rel=1e-5)
    loads = run["loads"]
    levels = base64.b64decode(loads["bytes"])
    for number in (0, 77):
        for layer in (0, 11):
            found = [levels[(number * 12 + layer) * 64 + expert] / loads["levels"] for expert in range(64)]
            expected = [64 * load for load in training[number][f"expert_load/moe_layer_{layer}"]]
            assert found == pytest.approx(expected, abs=0.5 / loads["levels"] + 1e-6)


def test_long_samples_and_odd_settings_fit_into_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=200, layers=1, experts=4)
    with (folder / "samples.jsonl").open("w") as file:
        for step in range(100):
            file.write(json.dumps({"step": step, "prompt": "p", "text": "x" * 100_000}) + "\n")
        file.write('{"step": 100, "prompt": NaN, "text": [1]}\n')
    (folder / "resolved" / "config.yaml").write_text("day: 2026-11-26\nnumber: .nan\n")
    page = build_page([read_run(folder, "run", 10)])
    assert len(page) < 500_000
    samples = data_of(page)["runs"][0]["samples"]
    assert samples[0] == [100, "nan", "[1]"]
    assert samples[1][2] == "x" * 2000
    assert data_of(page)["settings"][:2] == [["day", ['"2026-11-26"']], ["number", ["NaN"]]]


def test_page_of_four_runs_is_below_three_megabytes(run_dir: Path, other_dir: Path) -> None:
    runs = [read_run(folder, str(number), bins_per_run(4)) for number, folder in enumerate([run_dir, other_dir] * 2)]
    assert len(build_page(runs).encode()) < MOST_BYTES


@pytest.mark.slow
def test_page_of_100_000_logged_steps_is_below_three_megabytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", steps=640)
    templates = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            line = templates[step % len(templates)]
            file.write(re.sub(r'"step": \d+, "time": [\d.]+', f'"step": {step}, "time": {step}', line, count=1) + "\n")
    page = build_page([read_run(folder, "long", bins_per_run(1))])
    assert 1_000_000 < len(page.encode()) < MOST_BYTES
    [run] = data_of(page)["runs"]
    assert max(max(group["step"]) for group in run["groups"]) == 100_000


@pytest.mark.parametrize("kind", ["old", "dense", "damaged", "unknown"])
def test_unusual_runs_are_shown(tmp_path: Path, kind: str) -> None:
    lines = [json.dumps({"step": step, "loss": 3.0, "lr": 0.1}) for step in (1, 2)]
    if kind == "damaged":
        lines += [
            "{",
            '{"step": "x"}',
            "[1]",
            '{"step": 3, "loss": null}',
            '{"step": 4, "expert_load/moe_layer_0": [1, "a"]}',
        ]
        for name in ("launches", "supervisor", "samples"):
            (tmp_path / f"{name}.jsonl").write_bytes(b'\xff\n{"step": null}\n[]\n')
        (tmp_path / "resolved").mkdir()
        (tmp_path / "resolved" / "config.yaml").write_text("a: [")
    if kind == "unknown":
        lines.append(json.dumps({"step": 3, "unknown_metric/x": 1.5, "text": "x"}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    data = data_of(build_page([read_run(tmp_path, "run", 10)]))
    keys = set(chain.from_iterable(group["curves"] for group in data["runs"][0]["groups"]))
    assert keys == {"loss", "lr"} | ({"unknown_metric/x"} if kind == "unknown" else set())
    assert data["runs"][0]["loads"] is None
    assert all(group["hours"] is None for group in data["runs"][0]["groups"])
    assert math.isclose(data["runs"][0]["groups"][0]["curves"]["loss"][0], 3.0)


def report(*arguments: object, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-X", "importtime", REPOSITORY / "tools/report.py", *arguments]
    arguments_as_text = [str(argument) for argument in command]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(arguments_as_text, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_command_writes_the_page_without_loading_torch(run_dir: Path, other_dir: Path, tmp_path: Path) -> None:
    done = report(run_dir, other_dir, "--output", "out.html", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"out\.html: 0\.\d MB, 2 runs\n", done.stdout)
    assert data_of((tmp_path / "out.html").read_text())["runs"][1]["name"] == "second"
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


@pytest.mark.parametrize(
    ("run", "output", "line"),
    [
        ("missing", "out.html", "error: missing: has no metrics.jsonl; give the run folder"),
        ("", "no/out.html", "error: --output no/out.html: is in a folder that does not exist; create the folder first"),
        ("", ".", "error: --output .: is a folder; give a file such as report.html"),
    ],
)
def test_command_line_errors_are_one_line(run_dir: Path, tmp_path: Path, run: str, output: str, line: str) -> None:
    done = report(run or run_dir, "--output", output, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_run_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metrics\.jsonl; give the run folder"):
        read_run(tmp_path, "run", 10)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"metrics\.jsonl: has no record"):
        read_run(tmp_path, "run", 10)


def test_chart_library_is_the_unmodified_release() -> None:
    """Check uPlot 1.6.32, MIT: https://github.com/leeoniya/uPlot."""
    assets = files("hypermoe_ds.report") / "assets"
    library = (assets / "uPlot.iife.min.js").read_bytes()
    assert library.startswith(b"/*! https://github.com/leeoniya/uPlot (v1.6.32) */")
    assert hashlib.sha256(library).hexdigest() == SHA256
    assert "MIT License" in (assets / "uPlot.LICENSE").read_text()


SHA256 = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
