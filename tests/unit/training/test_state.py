"""Test that a checkpoint restores the position of a run, and that an invalid position is refused."""

from typing import Any

import pytest

from hypermoe_ds.data.stage_start import StageStart
from hypermoe_ds.errors import UserError
from hypermoe_ds.training.state import TrainState


def test_state_survives_saving_and_an_empty_one_is_new() -> None:
    state = TrainState(3, 24, StageStart(8, 1, 64, 2, {"a": 0.25, "b": 0.75}, {"c/64": 8}), 1, 16)
    assert TrainState.from_dict(state.to_dict()) == state
    assert TrainState.from_dict({}) == TrainState()
    assert TrainState.from_dict({"step": 3, "consumed_samples": 24}).good_samples == 24


@pytest.mark.parametrize(
    "saved", [{"step": -1}, {"step": "3"}, {"step": 1.5}, {"consumed_samples": None}, {"data_stage": 3}, {"stop": 3}]
)
def test_invalid_saved_state_is_refused(saved: dict[str, Any]) -> None:
    [key] = saved
    with pytest.raises(UserError, match=rf"^state.run.{key} of the checkpoint: .*; choose another checkpoint$"):
        TrainState.from_dict(saved)
