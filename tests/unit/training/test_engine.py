"""Where the ranks meet, and what is built on them."""

import socket
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.training import engine
from hypermoe_ds.training.engine import build_engine, start_ranks
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig


def test_a_port_that_is_taken_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"^port {port} of 127.0.0.1: .*--master_port"):
            start_ranks()


def built_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that DeepSpeed is given."""
    given: list[Any] = []

    def initialize(model: Any, **_: Any) -> tuple[None]:
        given.append(model)
        return (None,)

    monkeypatch.setattr(engine.deepspeed, "initialize", initialize)
    config = HyperMoEConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=2
    )
    train = TrainConfig(steps=1, micro_batch_size=1, global_batch_size=1, precision="fp32")
    build_engine(config, {}, OptimizerConfig(lr=1e-3), ScheduleConfig(), train, ParallelConfig())
    return given[0]


@pytest.mark.parametrize(("gpu", "installed"), [(True, True), (True, False), (False, True)])
def test_liger_computes_the_loss_where_there_are_both_it_and_a_gpu(
    gpu: bool, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def liger_fused_linear_cross_entropy(
        input: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ce_weight: Any = None,
        ignore_index: int = -100, reduction: str = "mean", accum_dtype: Any = None,
    ) -> Tensor:  # fmt: skip
        calls.append(accum_dtype)
        return F.cross_entropy(F.linear(input, weight), target, ignore_index=ignore_index, reduction=reduction)

    stand_in: Any = ModuleType("liger_kernel.transformers.functional")
    stand_in.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel") if installed else None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    model = built_model(monkeypatch)

    ids = torch.arange(10).view(2, 5)
    seen = model(input_ids=ids, labels=ids, output_logits=False).lm_loss
    assert calls == [torch.float32] * (gpu and installed)
    assert seen.item() == pytest.approx(model(input_ids=ids, labels=ids).lm_loss.item(), rel=1e-6)
