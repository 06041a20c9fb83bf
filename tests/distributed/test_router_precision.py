"""The router of the expert-parallel layer computes logits in the same precision as the model's own router."""

import pytest
import torch
from engine_runs import engine_of, steps_on
from small_runs import SEED, STEPS, Layout, batches_of_rank, model_config, probe_of, wake_hypernetwork
from torch import Tensor

from hypermoe_ds.modeling import HyperMoEForCausalLM
from tests.helpers.ranks import run_on_ranks


def routing_of(model: HyperMoEForCausalLM, rank: int) -> tuple[Tensor, Tensor]:
    """Return the router logits and the selected experts of the first MoE layer.

    Before this layer, the expert-parallel model and the plain model run the same modules.
    """
    with torch.no_grad():
        output = model.eval()(input_ids=probe_of(rank), use_cache=False, output_router_logits=True)
    return output.router_logits[0], output.selected_experts[0]


LAYOUTS = {
    "fp32": Layout(expert=2, precision="bf16", model={"router_dtype": "fp32"}),
    "fp32, ZeRO 3, recomputed": Layout(
        expert=2, precision="bf16", stage=3, recompute=True, model={"router_dtype": "fp32"}
    ),
    "model": Layout(expert=2, precision="bf16", model={"router_dtype": "model"}),
}
Routed = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[float]]


def routed_on_rank(layouts: list[Layout]) -> list[Routed]:
    """For each layout, return the routing of AutoEP and of the model's own MoE block, and the training losses."""
    wake_hypernetwork()
    rank = torch.distributed.get_rank()
    results = []
    for layout in layouts:
        engine = engine_of(layout)
        torch.manual_seed(SEED)
        plain = HyperMoEForCausalLM(model_config(layout)).to(torch.bfloat16)
        parallel = routing_of(engine.module, rank)
        engine.train()
        losses = [step.loss for step in steps_on(engine, batches_of_rank(layout, rank), STEPS)]
        results.append((parallel, routing_of(plain, rank), losses))
    return results


@pytest.fixture(scope="module")
def routed() -> dict[str, list[Routed]]:
    """Return the results of each rank by layout."""
    ranks = run_on_ranks(2, routed_on_rank, list(LAYOUTS.values()))
    return dict(zip(LAYOUTS, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_autoep_and_the_model_route_identically_in_both_precisions(name: str, routed: dict[str, list[Routed]]) -> None:
    dtype = torch.float32 if name.startswith("fp32") else torch.bfloat16
    for parallel, plain, losses in routed[name]:
        assert parallel[0].dtype == plain[0].dtype == dtype
        assert torch.equal(parallel[0], plain[0])
        assert torch.equal(parallel[1], plain[1])
        assert losses[-1] < losses[0]
