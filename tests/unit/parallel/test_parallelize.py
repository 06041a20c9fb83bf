"""Test the changes that `parallelize` makes to DeepSpeed's engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.utils import has_inf_or_nan
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from hypermoe_ds.parallel.parallelize import has_invalid_gradient

LARGEST = torch.finfo(torch.float32).max


def optimizer_with(*gradients: Tensor) -> Any:
    """Build the part of an optimizer that DeepSpeed's own check reads, with two parameter groups."""
    return SimpleNamespace(
        averaged_gradients={0: list(gradients[:1]), 1: list(gradients[1:])},
        bit16_groups=[[], []],
        _has_inf_or_nan=has_inf_or_nan,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0, LARGEST, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 6])
def test_the_check_of_gradients_agrees_with_deepspeeds_own_check(
    dtype: torch.dtype, value: float, position: int
) -> None:
    gradients = [torch.full((7,), 0.5, dtype=dtype), torch.full((3, 5), -2.0), torch.empty(0)]
    gradients[0][position] = value
    optimizer = optimizer_with(*gradients)
    expected = DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial(optimizer)
    result = has_invalid_gradient(optimizer)
    assert result.shape == expected.shape
    assert result.item() == expected.item() == (not torch.isfinite(gradients[0]).all())


def test_large_finite_gradients_are_valid_even_if_their_squares_overflow() -> None:
    assert not has_invalid_gradient(optimizer_with(torch.full((4,), LARGEST), torch.full((4,), -LARGEST))).item()


def test_a_rank_without_gradients_has_no_invalid_gradient() -> None:
    assert not has_invalid_gradient(optimizer_with()).item()
