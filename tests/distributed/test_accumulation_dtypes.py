"""Save and resume under every precision, ZeRO stage and type in which gradients are added up."""

from pathlib import Path

import pytest
import torch
from elastic_runs import BEFORE, Ended, first_norms, resume_each, save_each
from small_runs import Layout

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import CheckpointReader
from hypermoe_ds.checkpoint.store import step_name
from tests.helpers.ranks import run_on_ranks

KINDS = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]  # fp16 needs a GPU
LAYOUTS = [
    Layout(ranks=2, expert=2, stage=stage, accumulation=2, precision=precision, accumulate=accumulate)
    for precision, accumulate in KINDS
    for stage in (1, 2, 3)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp("run") for _ in LAYOUTS]


@pytest.fixture(scope="module")
def saved(folders: list[Path]) -> list[Ended]:
    """A run of each layout that was saved and went on."""
    ended: list[Ended] = run_on_ranks(2, save_each, LAYOUTS, folders)[0]
    return ended


def named(layout: Layout) -> str:
    return f"{layout.precision} added up in {layout.accumulate}, ZeRO {layout.stage}"


def test_each_goes_on_as_if_it_had_never_stopped(
    folders: list[Path], saved: list[Ended], tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = [tmp_path_factory.mktemp("again") for _ in LAYOUTS]
    resumed = run_on_ranks(2, resume_each, LAYOUTS, folders, again)[0]
    for layout, (steps, logits), (expected, last) in zip(LAYOUTS, resumed, saved, strict=True):
        assert steps == expected, named(layout)
        assert torch.equal(logits, last), named(layout)


def test_each_goes_on_from_a_checkpoint_of_another(
    folders: list[Path], saved: list[Ended], tmp_path_factory: pytest.TempPathFactory
) -> None:
    others = [*LAYOUTS[4:], *LAYOUTS[:4]]
    again = [tmp_path_factory.mktemp("again") for _ in LAYOUTS]
    run_on_ranks(2, resume_each, others, folders, again)
    assert saved
    for layout, one, other in zip(others, folders, again, strict=True):
        with (
            CheckpointReader(RunFolder(one).checkpoints / step_name(BEFORE)) as first,
            CheckpointReader(RunFolder(other).checkpoints / step_name(BEFORE)) as second,
        ):
            for name in first.manifest.tensors:
                for kind in first.manifest.kinds:
                    assert torch.equal(first.read(name, kind), second.read(name, kind)), (named(layout), kind, name)


def test_losses_of_fp32_sums_of_bf16_gradients_are_alike_under_each_stage(saved: list[Ended]) -> None:
    *_, (one, _), (two, _), (three, _) = saved
    for steps in (one, three):
        losses = [step.loss for step in steps]
        # Up to 2.1e-3 seen: in bf16 a token's experts change with the last digit.
        assert losses == pytest.approx([step.loss for step in two], rel=1e-2)


def test_the_norm_of_fp32_sums_of_bf16_gradients_is_that_of_fp32_under_each_stage() -> None:
    layouts = [LAYOUTS[1], *LAYOUTS[6:]]
    expected, *norms = run_on_ranks(2, first_norms, layouts)[0]
    assert norms == pytest.approx([expected] * 3, rel=1e-2)
