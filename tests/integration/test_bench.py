"""Run the benchmarks end to end with a tiny model, without checking the timings."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from hypermoe_ds.modeling import HyperMoEConfig
from tests.helpers.ranks import CPU

REPOSITORY = Path(__file__).parents[2]
BENCH = REPOSITORY / "benchmarks"
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "bottleneck_size": 8,
    "adapter_size": 8,
}

Compare = Callable[..., dict[str, Any]]


def run(script: str, *arguments: object, python_path: str = str(REPOSITORY)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / script), *map(str, arguments)],
        env={**os.environ, **CPU, "PYTHONPATH": python_path},
        capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """Return a function that compares training steps of a tiny model.

    While a script runs, megatron-core cannot be imported, and every Python process prints a line as a library might.
    """
    folder = tmp_path_factory.mktemp("bench")
    (folder / "megatron.py").write_text("raise ImportError('a benchmark needs no megatron-core')\n")
    (folder / "sitecustomize.py").write_text("print('output of a library')\n")

    def compared(*arguments: object) -> dict[str, Any]:
        model = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
        common = ("--sequence-length", 16, "--threads", 1, "--json", folder / "found.json")
        done = run("train_step.py", *common, *arguments, *model, python_path=f"{folder}{os.pathsep}{REPOSITORY}")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
        assert all(f"| {side} |" in done.stdout for side in found["sides"])
        return found

    return compared


@pytest.fixture(scope="module")
def on_two_ranks(compare: Compare, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    profile = tmp_path_factory.mktemp("profile") / "profile.md"
    arguments = ("--ranks", 2, "--expert-parallel", 2, "--steps", 3, "--warmup", 1, "--profile", profile)
    return {**compare(*arguments), "profile": profile.read_text()}


@pytest.fixture(scope="module")
def peers(compare: Compare) -> dict[str, Any]:
    return compare("--ranks", 1, "--sides", "mixtral,deepspeed_moe,per_token,moe", "--steps", 3, "--warmup", 0)


def test_every_side_trains_and_reports_finite_losses(on_two_ranks: dict[str, Any], peers: dict[str, Any]) -> None:
    for found, ranks in ((on_two_ranks, 2), (peers, 1)):
        for side in found["sides"].values():
            assert len(side["losses"]) == len(side["step_seconds"]) == 3
            assert all(math.isfinite(loss) for loss in side["losses"])
            assert len(side["peak_memory_gib"]) == ranks
            assert min(side["peak_memory_gib"]) > 0


def test_ratios_compare_medians_and_the_ranks_with_the_largest_memory(
    on_two_ranks: dict[str, Any], peers: dict[str, Any]
) -> None:
    for found in (on_two_ranks, peers):
        assert found["baseline"] == "moe"
        base = found["sides"]["moe"]
        for name, side in found["sides"].items():
            assert side["median_seconds"] == median(side["step_seconds"])
            assert found["ratios"][name]["step_time"] == side["median_seconds"] / base["median_seconds"]
            assert found["ratios"][name]["peak_memory"] == max(side["peak_memory_gib"]) / max(base["peak_memory_gib"])
            ranks = found["settings"]["ranks"]
            assert side["tokens_per_second"] == pytest.approx(ranks * 2 * 16 / side["median_seconds"])


def test_all_micro_batches_count_and_activation_checkpointing_changes_no_loss(compare: Compare) -> None:
    common = ("--ranks", 1, "--steps", 2, "--warmup", 0)
    plain = compare(*common)
    found = compare(*common, "--accumulation", 2, "--activation-checkpointing")
    for name, side in found["sides"].items():
        assert side["tokens_per_second"] == pytest.approx(2 * 2 * 16 / side["median_seconds"])
        assert side["losses"][0] == pytest.approx(plain["sides"][name]["losses"][0], rel=1e-6)


def test_sides_have_the_same_parameters_except_the_hypernetwork(
    on_two_ranks: dict[str, Any], peers: dict[str, Any]
) -> None:
    counts = HyperMoEConfig(**TINY).parameter_counts()
    sides = {**on_two_ranks["sides"], **peers["sides"]}
    expected = dict.fromkeys(("hypermoe", "per_token"), counts.total)
    expected |= dict.fromkeys(("moe", "mixtral", "deepspeed_moe"), counts.total - counts.hypernetwork)
    assert {name: side["parameters"] for name, side in sides.items()} == expected


def test_the_deepspeed_layer_starts_with_the_loss_of_our_moe(peers: dict[str, Any]) -> None:
    ours, theirs = (peers["sides"][name]["losses"][0] for name in ("moe", "deepspeed_moe"))
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_the_profile_has_every_category_of_both_sides(on_two_ranks: dict[str, Any]) -> None:
    milliseconds = on_two_ranks["profile_milliseconds"]
    assert set(milliseconds) == {"hypermoe", "moe"}
    for side in milliseconds.values():
        for kind in ("GEMM", "communication", "optimizer", "cross-entropy", "elementwise and other"):
            assert side[kind] > 0, kind
            assert f"| {kind} |" in on_two_ranks["profile"]


def test_bad_arguments_give_one_line() -> None:
    for arguments, message in (
        (("--sides", "moe,mixtrol"), "did you mean 'mixtral'?"),
        (("hidden_size=3.5",), "wrong type"),
        (("--sides", "moe,mixtral", "--activation-checkpointing"), "only supported by hypermoe, moe, per_token"),
    ):
        done = run("train_step.py", *arguments)
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_losses_that_differ_are_refused(tmp_path: Path) -> None:
    for name, last in (("one", 4.0), ("near", 4.01), ("far", 4.2), ("none", math.nan)):
        content = {"sides": {"hypermoe": {"losses": [6.0, last]}}}
        (tmp_path / name).write_text(json.dumps(content))
    assert run("compare_losses.py", tmp_path / "one", tmp_path / "near").returncode == 0
    for other in ("far", "none"):
        done = run("compare_losses.py", tmp_path / "one", tmp_path / other)
        assert done.returncode == 2
        assert "largest relative difference" in done.stderr
