"""Reductions over ranks: validation losses, routing statistics and failures."""

import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import Layout, S, model_config, random_tokens
from torch.nn import functional as F

from hypermoe_ds.data.loader import validation_batches
from hypermoe_ds.modeling import HyperMoEForCausalLM
from hypermoe_ds.monitor.losses import LossMeter
from hypermoe_ds.monitor.routing import RoutingMeter, StepStatistics
from hypermoe_ds.training.evaluation import Evaluation, evaluate
from tests.helpers.ranks import run_on_ranks

SAMPLES = 7
N, K = 5, 2


class Numbered:
    """A dataset of random sequences."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = random_tokens(100 + index, S + 1)
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def model() -> HyperMoEForCausalLM:
    torch.manual_seed(0)
    return HyperMoEForCausalLM(model_config(Layout())).eval()


def evaluate_on_rank(micro_batch: int) -> Evaluation:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = validation_batches(Numbered(), micro_batch, rank, size, model_config(Layout()).vocab_size)
    return evaluate(model(), batches, torch.device("cpu"))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 1), (2, 2), (3, 3)])
def test_validation_over_ranks_equals_one_process_for_any_split_of_the_samples(ranks: int, micro_batch: int) -> None:
    network, losses = model(), []
    for index in range(SAMPLES):
        sample = Numbered()[index]
        with torch.no_grad():
            logits = network(input_ids=sample["tokens"].unsqueeze(0)).logits.squeeze(0)
        losses += F.cross_entropy(logits.double(), sample["labels"], reduction="none").tolist()
    for result in run_on_ranks(ranks, evaluate_on_rank, micro_batch):
        assert result.tokens == SAMPLES * S
        assert result.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


def output_of(number: int) -> Any:
    """Return the output of a forward pass with one MoE layer."""
    generator = torch.Generator().manual_seed(number)
    logits_TN = torch.randn(24, N, generator=generator) * 2
    losses = torch.rand(4, generator=generator)
    norms_2 = torch.rand(2, generator=generator) + 0.5
    return SimpleNamespace(
        loss=losses[0], lm_loss=losses[1], aux_loss=losses[2], z_loss=losses[3], hyper_expert_norms=(norms_2,),
        router_logits=(logits_TN,), selected_experts=(logits_TN.topk(K).indices,),
    )  # fmt: skip


def meter_on_rank() -> tuple[StepStatistics, dict[str, float]]:
    meter, losses = RoutingMeter(N), LossMeter()
    for micro_batch in range(2):
        output = output_of(2 * torch.distributed.get_rank() + micro_batch)
        meter.add(output)
        losses.add(output)
    return meter.read(), losses.read()


def test_statistics_over_ranks_equal_those_of_all_micro_batches() -> None:
    alone, outputs = RoutingMeter(N), [output_of(number) for number in range(4)]
    for output in outputs:
        alone.add(output)
    expected = alone.read()
    for statistics, losses in run_on_ranks(2, meter_on_rank):
        assert losses["loss"] == pytest.approx(math.fsum(float(output.lm_loss) for output in outputs) / 4)
        assert statistics.scalars == pytest.approx(expected.scalars, rel=1e-6)
        torch.testing.assert_close(statistics.load_MN, expected.load_MN)


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("only here")
    torch.distributed.barrier()


def test_a_failing_rank_ends_the_group_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ValueError: only here"):
        run_on_ranks(2, fail_on_rank_one)
