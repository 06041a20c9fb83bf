"""Run tools/inspect_checkpoint.py as a user does."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hypermoe_ds.checkpoint.shards import write_weights
from tests.helpers.checkpoints import small_model, training_weights, write_checkpoint, write_run
from tests.helpers.jobs import REPOSITORY, run_script

TOOL = "tools/inspect_checkpoint.py"
MIB = 2**20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    first, second = (training_weights(small_model(seed)) for seed in (1, 2))
    return write_run(tmp_path / "run", small_model(), {3: first, 5: second})


def test_a_run_its_checkpoint_and_its_export_are_identified_and_have_equal_weights(run: Path, tmp_path: Path) -> None:
    small_model(2).save_pretrained(tmp_path / "hf")
    parameters = small_model().config.parameter_counts().total
    for path, kind in ((run, "run folder"), (run / "checkpoints/step_00000005", "checkpoint folder")):
        done = run_script(
            TOOL, "--checkpoint", path, "--compare", tmp_path / "hf", "--json", "seen.json", folder=tmp_path
        )
        assert done.returncode == 0, done.output()
        assert f": {kind}\n" in done.stdout
        assert ": Hugging Face folder\n" in done.stdout
        assert done.stdout.count(f" {parameters:,}\n") >= 1
        assert done.stdout.endswith("  no difference\n")
        seen = json.loads((tmp_path / "seen.json").read_text())
        assert [folder["provenance"]["kind"] for folder in seen["folders"]] == [kind, "Hugging Face folder"]
        assert seen["folders"][0]["provenance"]["step"] == 5
        assert len(seen["differences"]) == 1


def test_comparing_with_an_earlier_step_reports_differences(run: Path, tmp_path: Path) -> None:
    done = run_script(
        TOOL, "--checkpoint", run, "--compare", run / "checkpoints/step_00000005", "--step", 3, folder=tmp_path
    )
    assert done.returncode == 0, done.output()
    assert "step_00000003: run folder\n" in done.stdout
    assert "no difference" not in done.stdout
    assert "exp_avg_sq: ||second - first|| / ||first||" in done.stdout


def test_nan_gives_exit_code_1_and_the_name_of_the_tensor(tmp_path: Path) -> None:
    weights = training_weights(small_model())
    weights["model.norm.weight"] = torch.full((32,), math.nan)
    write_checkpoint(tmp_path / "cut", weights, moments=False)
    done = run_script(TOOL, "--checkpoint", tmp_path / "cut", folder=tmp_path)
    assert done.returncode == 1
    assert "weight/model.norm.weight: 32 NaN, 0 Inf of 32\n" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("EMPTY", "is not a run folder, checkpoint folder or Hugging Face folder"),
        ("EMPTY --step 3", "only run folders have steps"),
        ("RUN --step 4", "choose a saved step: 3, 5"),
        ("RUN --json none/seen.json", "cannot be written"),
    ],
)
def test_bad_input_gives_one_line(arguments: str, message: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "EMPTY").mkdir()
    words = [str(run) if word == "RUN" else word for word in arguments.split()]
    done = run_script(TOOL, "--checkpoint", *words, folder=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


# This program runs the tool and prints the peak anonymous memory of the process. Memory-mapped files are not counted,
# because the operating system can drop them at any time.
WATCHED = """
import pathlib, runpy, sys, threading, time
import torch, transformers, safetensors.torch, numpy, hypermoe_ds.inspection.statistics

def own():
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

before, peak, over = own(), 0, threading.Event()
def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, own())
watcher = threading.Thread(target=watch)
watcher.start()
code = 0
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as leaving:
    code = leaving.code
over.set()
watcher.join()
print(peak - before, file=sys.stderr)
sys.exit(code)
"""


def large_weights() -> Iterator[tuple[str, Tensor]]:
    """Yield 416 MiB of fp32 weights; the largest tensor has 128 MiB."""
    yield "model.embed_tokens.weight", torch.randn(2**16, 512)
    for layer in range(2):
        for part in ("w1", "w2", "w3"):
            yield f"model.layers.{layer}.mlp.experts.{part}", torch.randn(24, 1024, 512)


def test_memory_stays_below_the_size_of_the_largest_tensor(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, large_weights(), {}, {}, shard_bytes=200 * MIB)
    total = sum(path.stat().st_size for path in (tmp_path / "first").iterdir())
    assert total > 400 * MIB
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, REPOSITORY / TOOL, "--checkpoint", "first", "--compare", "second"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the experts differ" in done.stdout
    assert int(done.stderr.splitlines()[-1]) < 128 * MIB
