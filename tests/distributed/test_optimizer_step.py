"""DeepSpeed's optimizer step runs PyTorch's fused AdamW kernel."""

import pytest
from engine_runs import operations_of_a_step
from small_runs import Layout

from tests.helpers.ranks import run_on_ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_optimizer_step_runs_only_the_fused_kernel(stage: int, precision: str) -> None:
    (counts,) = run_on_ranks(1, operations_of_a_step, Layout(ranks=1, stage=stage, precision=precision))
    assert counts["aten::_fused_adamw_"] >= 1
    assert not counts["aten::addcdiv_"]
    assert not counts["aten::_foreach_addcdiv_"]
