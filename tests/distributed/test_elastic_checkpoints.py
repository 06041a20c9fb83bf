"""A run resumed under any number of ranks, expert-parallel size and ZeRO stage equals an uninterrupted run."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from elastic_runs import (
    BEFORE,
    LAYOUTS,
    SPREADS,
    STAGES,
    name_of,
    resume_each,
    save_each,
    save_untrained_and_train,
    train_untrained,
    with_one_micro_batch,
)
from engine_runs import Step
from small_runs import Layout
from torch import Tensor

from hypermoe_ds.checkpoint.directory import step_name
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import MOMENTS, WEIGHT, CheckpointReader
from tests.helpers.ranks import run_on_ranks
from tests.helpers.routing import Tie, assert_same_until_a_tie

LIMIT = 1e-4  # largest relative difference; 2e-7 was measured, but a ReLU input close to zero can cause more

# Every layout occurs once as the saved and once as the resumed layout, and every pair of ZeRO stages occurs.
COVERING = [
    (LAYOUTS[3 * ((onto - 1 - stage) % len(SPREADS)) + stage], LAYOUTS[3 * onto + (stage + onto) % len(STAGES)])
    for onto in range(len(SPREADS))
    for stage in range(len(STAGES))
]


@dataclass
class Saved:
    """A run that saved a checkpoint and continued.

    Attributes:
        folder: folder of the run.
        steps: steps after the checkpoint.
        logits: logits after the last step.
    """

    folder: Path
    steps: list[Step]
    logits: Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Train one run per layout; return the runs by the name of their layout."""
    runs = {}
    for ranks, expert in SPREADS:
        layouts = [layout for layout in LAYOUTS if (layout.ranks, layout.expert) == (ranks, expert)]
        folders = [tmp_path_factory.mktemp("run") for _ in layouts]
        ended = run_on_ranks(ranks, save_each, layouts, folders)[0]
        for layout, folder, end in zip(layouts, folders, ended, strict=True):
            runs[name_of(layout)] = Saved(folder, *end)
    return runs


def assert_same_content(one: Path, other: Path) -> None:
    """Check that two checkpoints have the same values, regardless of how they are sharded."""
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


def assert_same_steps(steps: list[Step], others: list[Step]) -> Tie | None:
    """Check that losses and gradient norms agree, up to the first tie between experts, if there is one."""
    ours, theirs = ([step.numbers for step in of] for of in (steps, others))
    routing = ([step.routing for step in steps], [step.routing for step in others])
    return assert_same_until_a_tie(ours, theirs, routing, LIMIT)


def largest_difference(steps: list[Step], others: list[Step]) -> float:
    """Return the largest relative difference of losses and gradient norms."""
    one, other = (torch.tensor([step.numbers for step in of]) for of in (steps, others))
    return float(((one - other) / other).abs().max())


def differences_after_resuming(
    saved: dict[str, Saved], pairs: list[tuple[Layout, Layout]], folder: Path
) -> list[float]:
    """Resume each run, check its state bitwise, and return its largest difference from the uninterrupted run."""
    runs = [saved[name_of(source)] for source, _ in pairs]
    targets = [target for _, target in pairs]
    copies = [folder / str(number) for number in range(len(pairs))]
    ended = run_on_ranks(targets[0].ranks, resume_each, targets, [run.folder for run in runs], copies)[0]
    for run, copy, (steps, logits) in zip(runs, copies, ended, strict=True):
        assert_same_content(run.folder, copy)
        if assert_same_steps(steps, run.steps) is None:
            assert (logits - run.logits).abs().max() <= 1e-3 * run.logits.abs().max()
    return [largest_difference(steps, run.steps) for run, (steps, _) in zip(runs, ended, strict=True)]


@pytest.mark.parametrize("spread", SPREADS, ids=lambda spread: f"onto {spread[0]} ranks EP {spread[1]}")
def test_a_run_resumes_under_another_layout_with_the_same_moments_and_losses(
    saved: dict[str, Saved], tmp_path: Path, spread: tuple[int, int]
) -> None:
    pairs = [pair for pair in COVERING if (pair[1].ranks, pair[1].expert) == spread]
    assert len(pairs) == len(STAGES)
    differences_after_resuming(saved, pairs, tmp_path)


def test_gradient_accumulation_on_fewer_ranks_keeps_the_losses(tmp_path: Path) -> None:
    source, target = with_one_micro_batch(LAYOUTS[6]), with_one_micro_batch(LAYOUTS[0])
    assert (source.accumulation, target.accumulation) == (2, 4)
    [(steps, _)] = run_on_ranks(source.ranks, save_each, [source], [tmp_path / "run"])[0]
    [(again, _)] = run_on_ranks(target.ranks, resume_each, [target], [tmp_path / "run"], [tmp_path / "copy"])[0]
    assert_same_steps(again, steps)


@pytest.mark.parametrize("target", [LAYOUTS[8], LAYOUTS[4], LAYOUTS[0]], ids=name_of)
def test_training_from_saved_weights_equals_training_from_initialisation(tmp_path: Path, target: Layout) -> None:
    source = LAYOUTS[3]
    built = run_on_ranks(source.ranks, save_untrained_and_train, source, tmp_path)[0]
    with CheckpointReader(RunFolder(tmp_path).checkpoints / step_name(0)) as reader:
        assert reader.manifest.kinds == (WEIGHT,)
    loaded = run_on_ranks(target.ranks, train_untrained, target, tmp_path)[0]
    assert_same_steps(loaded, built)


def test_the_chosen_pairs_cover_all_layouts_and_stages() -> None:
    everything = {name_of(layout) for layout in LAYOUTS}
    assert {name_of(source) for source, _ in COVERING} == everything == {name_of(target) for _, target in COVERING}
    assert len({(source.stage, target.stage) for source, target in COVERING}) == 9
    assert all(source != target for source, target in COVERING)


@pytest.mark.slow
def test_every_layout_resumes_under_every_other(saved: dict[str, Saved], tmp_path: Path) -> None:
    """Print a table of the largest relative differences of ten losses and gradient norms."""
    table = {}
    for number, target in enumerate(LAYOUTS):
        pairs = [(source, target) for source in LAYOUTS]
        for (source, _), difference in zip(
            pairs, differences_after_resuming(saved, pairs, tmp_path / str(number)), strict=True
        ):
            table[f"{name_of(source)} -> {name_of(target)}"] = difference
    print(json.dumps(table, indent=1))
