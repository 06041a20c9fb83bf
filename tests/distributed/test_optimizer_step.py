"""The kernel that takes the AdamW step, through DeepSpeed."""

import pytest
from engine_runs import operations_of_a_step
from small_runs import Layout

from tests.helpers.ranks import run_on_ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_step_is_the_fused_kernel_and_no_loop_over_single_operations(stage: int, precision: str) -> None:
    (counts,) = run_on_ranks(1, operations_of_a_step, Layout(ranks=1, stage=stage, precision=precision))
    assert counts["aten::_fused_adamw_"] >= 1
    assert not counts["aten::addcdiv_"]
    assert not counts["aten::_foreach_addcdiv_"]
