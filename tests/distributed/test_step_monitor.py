"""All ranks skip steps with NaN or Inf, report loss spikes, react to stop signals, and compare replicas."""

from pathlib import Path

import pytest
from small_runs import Layout
from step_monitor_runs import EXPERTS, HYPERNETWORK, asked_to_stop, flip_each, skip_each, spike, too_many_bad_steps

from tests.helpers.ranks import run_on_ranks

RANKS = 2
STAGES = (1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp32")


@pytest.mark.parametrize(
    ("what", "precision"),
    [
        (HYPERNETWORK, "bf16"),
        (EXPERTS, "fp32"),
        ("loss", "fp32"),
        pytest.param(HYPERNETWORK, "fp32", marks=pytest.mark.slow),
        pytest.param(EXPERTS, "bf16", marks=pytest.mark.slow),
        pytest.param("loss", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_bad_step_on_one_rank_only_skips_its_samples(what: str, precision: str) -> None:
    stages = STAGES if what != "loss" else (2,)
    layouts = [Layout(RANKS, expert=2, stage=stage, accumulation=2, precision=precision) for stage in stages]
    run_on_ranks(RANKS, skip_each, layouts, what)


@pytest.mark.parametrize(
    ("good", "again"),
    [
        (Path("checkpoints/step_7"), "resume from the last good checkpoint, checkpoints/step_7,"),
        pytest.param(
            Path("checkpoints/step_5"),
            "write step_5 into checkpoints/latest and resume from the last good checkpoint, checkpoints/step_5,",
            marks=pytest.mark.slow,
        ),
        pytest.param(None, "start a new run (there is no good checkpoint)", marks=pytest.mark.slow),
    ],
)
def test_too_many_consecutive_bad_steps_end_the_run_and_report_checkpoint_and_data(
    good: Path | None, again: str
) -> None:
    for error, step in run_on_ranks(RANKS, too_many_bad_steps, Layout(RANKS), good):
        assert step == 4, "a single bad step does not end the run"
        assert error == (
            "train.max_bad_steps=1: 2 steps in a row up to step 4 had a NaN or Inf in loss or gradient; "
            f"{again} with a smaller optimizer.lr, or skip their data with train.skip_samples=[[16, 31]]"
        )


def test_a_flipped_bit_is_reported_with_parameter_and_rank() -> None:
    # ZeRO 3 does not partition parameters as small as these.
    layouts = [
        Layout(4, expert=2, stage=stage, precision=precision)
        for stage, precision in zip(STAGES, PRECISIONS, strict=True)
    ]
    for errors in run_on_ranks(4, flip_each, layouts, 3):
        for equal, hypernetwork, experts in errors:
            assert equal is None
            start = f"the copies of {HYPERNETWORK} differ after step 5: rank 3 differs from the majority; "
            assert hypernetwork.startswith(start)
            # Two ranks have a replica of each expert.
            assert experts.startswith(f"the copies of {EXPERTS} differ after step 5: ranks 1, 3 disagree, and no ")


def test_a_loss_spike_in_one_micro_batch_is_reported_with_its_samples() -> None:
    for lines in run_on_ranks(RANKS, spike, Layout(RANKS, accumulation=2)):
        [line] = lines
        assert line.startswith("warning: loss 3.7650 of step 21 is ")
        assert line.endswith(
            "samples 160 to 167, largest loss (9.0000) in 166 (of 166), 167 (of 167); "
            "set train.skip_samples=[[166, 167]] to skip these samples"
        )


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step() -> None:
    assert run_on_ranks(RANKS, asked_to_stop, Layout(RANKS), 1) == [[False, False, True, True]] * RANKS
