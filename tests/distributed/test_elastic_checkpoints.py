"""A run goes on under any number of ranks, expert parallelism and ZeRO stage as if it had never stopped."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_runs import (
    BEFORE,
    LAYOUTS,
    SPREADS,
    STAGES,
    name_of,
    resume_each,
    save_and_go_on,
    save_untrained_and_train,
    train_untrained,
    with_one_micro_batch,
)
from small_runs import Layout

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import MOMENTS, WEIGHT, CheckpointReader
from hypermoe_ds.checkpoint.store import step_name
from tests.helpers.ranks import run_on_ranks

# Every layout is left once and taken up once, and every pair of stages occurs.
COVERING = [
    (LAYOUTS[3 * spread + stage], LAYOUTS[3 * ((spread + 1 + stage) % len(SPREADS)) + (stage + spread) % len(STAGES)])
    for spread in range(len(SPREADS))
    for stage in range(len(STAGES))
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by their layout, each made once: its folder, its losses after the checkpoint, its last logits."""

    @cache
    def of(index: int) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("run")
        return folder, run_on_ranks(LAYOUTS[index].ranks, save_and_go_on, LAYOUTS[index], folder)[0]

    return lambda layout: of(LAYOUTS.index(layout))


def assert_same_content(one: Path, other: Path) -> None:
    """Two checkpoints hold the same numbers, however they are cut."""
    with (
        CheckpointReader(RunFolder(one).checkpoints / step_name(BEFORE)) as first,
        CheckpointReader(RunFolder(other).checkpoints / step_name(BEFORE)) as second,
    ):
        assert first.manifest.tensors.keys() == second.manifest.tensors.keys()
        for name in first.manifest.tensors:
            for kind in (WEIGHT, *MOMENTS):
                assert torch.equal(first.read(name, kind), second.read(name, kind)), (kind, name)
        assert first.manifest.state["run"] == second.manifest.state["run"]
        assert first.manifest.state["engine"] == second.manifest.state["engine"]


def largest_difference(steps: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Of losses and gradient norms, relative."""
    one, other = torch.tensor(steps), torch.tensor(others)
    return float(((one - other) / other).abs().max())


@pytest.mark.parametrize(("source", "target"), COVERING, ids=lambda layout: name_of(layout).replace(" ", ""))
def test_a_run_goes_on_under_another_layout_with_the_same_moments_and_losses(
    saved: Any, tmp_path: Path, source: Layout, target: Layout
) -> None:
    folder, (steps, logits) = saved(source)
    again, last_logits = run_on_ranks(target.ranks, resume_each, target, [folder], [tmp_path])[0][0]
    assert_same_content(folder, tmp_path)
    assert largest_difference(again, steps) <= 1e-4
    assert (last_logits - logits).abs().max() <= 1e-3 * logits.abs().max()


def test_the_same_micro_batch_on_fewer_ranks_accumulates_and_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    source, target = with_one_micro_batch(LAYOUTS[6]), with_one_micro_batch(LAYOUTS[0])
    assert (source.accumulation, target.accumulation) == (2, 4)
    steps, _ = run_on_ranks(source.ranks, save_and_go_on, source, tmp_path / "run")[0]
    again, _ = run_on_ranks(target.ranks, resume_each, target, [tmp_path / "run"], [tmp_path / "copy"])[0][0]
    assert largest_difference(again, steps) <= 1e-4


@pytest.mark.parametrize("target", [LAYOUTS[8], LAYOUTS[4], LAYOUTS[0]], ids=name_of)
def test_weights_alone_are_trained_on_as_a_model_just_built(tmp_path: Path, target: Layout) -> None:
    source = LAYOUTS[3]
    built = run_on_ranks(source.ranks, save_untrained_and_train, source, tmp_path)[0]
    with CheckpointReader(RunFolder(tmp_path).checkpoints / step_name(0)) as reader:
        assert reader.manifest.kinds == (WEIGHT,)
    loaded = run_on_ranks(target.ranks, train_untrained, target, tmp_path)[0]
    assert largest_difference(loaded, built) <= 1e-4


def test_the_covering_pairs_cover() -> None:
    assert {source for source, _ in COVERING} == set(LAYOUTS) == {target for _, target in COVERING}
    assert len({(source.stage, target.stage) for source, target in COVERING}) == 9
    assert all(source != target for source, target in COVERING)


@pytest.mark.slow
def test_every_layout_goes_on_under_every_other(saved: Any, tmp_path: Path) -> None:
    """Prints the table of docs/CHECKPOINTS.md: largest relative difference of ten losses and gradient norms."""
    table = {}
    for target in LAYOUTS:
        sources = [saved(source) for source in LAYOUTS]
        copies = [tmp_path / f"{LAYOUTS.index(target)}_{number}" for number in range(len(LAYOUTS))]
        folders = [folder for folder, _ in sources]
        resumed = run_on_ranks(target.ranks, resume_each, target, folders, copies)[0]
        for source, (folder, (steps, _)), copy, (again, _) in zip(LAYOUTS, sources, copies, resumed, strict=True):
            assert_same_content(folder, copy)
            table[f"{name_of(source)} -> {name_of(target)}"] = largest_difference(again, steps)
    print(json.dumps(table, indent=1))
    assert max(table.values()) <= 1e-4
