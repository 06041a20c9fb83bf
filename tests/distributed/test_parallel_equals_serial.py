"""Training under every parallel layout has the same results as a serial run.

The serial run trains the model without expert parallelism on the full batch in one process, with PyTorch's AdamW and
gradient clipping in plain code.
"""

import re
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import RankRun, train_on_rank
from small_runs import CLIP, MOST_RANKS, STEPS, Layout, SerialRun, model_config, serial_run

from tests.helpers.ranks import run_on_ranks
from tests.helpers.routing import assert_same_until_a_tie, first_tie

TOP_1 = {"num_experts_per_tok": 1}
ROUTE = {"hyper_conditioning": "route"}
WIDE = {"num_experts": 16, "adapter_size": 16}  # more HyperExperts than fit in the cache
BARE = {"shared_expert_size": 0, "first_dense_layers": 0, "norm_topk_prob": False}

LAYOUTS = {
    "EP 1": Layout(),
    "EP 2": Layout(expert=2),
    "EP 2, ZeRO 2": Layout(expert=2, stage=2),
    "EP 2, ZeRO 3": Layout(expert=2, stage=3),
    "EP 1, ZeRO 3": Layout(stage=3),
    "EP 1, accumulation": Layout(accumulation=2),
    "EP 2, accumulation": Layout(expert=2, accumulation=2),
    "EP 2, ZeRO 2, accumulation": Layout(expert=2, stage=2, accumulation=2),
    "EP 2, ZeRO 3, accumulation": Layout(expert=2, stage=3, accumulation=2),
    "EP 2, recomputed": Layout(expert=2, recompute=True),
    "EP 2, ZeRO 3, recomputed": Layout(expert=2, stage=3, recompute=True),
    "EP 2 of 4 ranks": Layout(ranks=MOST_RANKS, expert=2),
    "one rank": Layout(ranks=1),
    "top-1, EP 1": Layout(model=TOP_1),
    "top-1, EP 2": Layout(expert=2, model=TOP_1),
    "bare, EP 2": Layout(expert=2, model=BARE),
    "bare top-1, EP 2": Layout(expert=2, model=BARE | TOP_1),
    "top-1, at once, EP 2": Layout(expert=2, model=TOP_1, form="per_set"),
    "top-1, at once, EP 2, accumulation": Layout(expert=2, model=TOP_1, form="per_set", accumulation=2),
    "top-1, at once, ZeRO 3, recomputed": Layout(expert=2, stage=3, recompute=True, model=TOP_1, form="per_set"),
    "by layer, ZeRO 3": Layout(expert=2, stage=3, model=WIDE, form="per_set"),
    "by layer, EP 2, recomputed": Layout(expert=2, recompute=True, model=WIDE, form="per_set"),
    "route, EP 2": Layout(expert=2, model=ROUTE, form="per_set"),
    "route, ZeRO 3": Layout(expert=2, stage=3, model=ROUTE, form="per_set"),
    "no hypernetwork, EP 2": Layout(expert=2, model={"hypernetwork": False}),
    "all experts, untied, EP 2": Layout(expert=2, model={"num_experts_per_tok": 4, "tie_word_embeddings": False}),
    "masked documents, EP 1": Layout(masked=True),
    "masked documents, EP 2, accumulation": Layout(expert=2, accumulation=2, masked=True),
    "masked documents, EP 2, ZeRO 2, recomputed": Layout(expert=2, stage=2, recompute=True, masked=True),
    "masked documents, ZeRO 3, accumulation": Layout(expert=2, stage=3, accumulation=2, masked=True),
    "loads of each micro-batch, EP 2": Layout(
        expert=2, accumulation=2, model={"router_aux_loss_scope": "micro_batch"}
    ),
}  # fmt: skip
REPLICATED_IN_MEMORY = [name for name, layout in LAYOUTS.items() if layout.stage < 3]


@pytest.fixture(scope="module")
def runs() -> dict[str, list[RankRun]]:
    """Train every layout and return the results of its ranks."""
    return {name: run_on_ranks(layout.ranks, train_on_rank, layout) for name, layout in LAYOUTS.items()}


@pytest.fixture(params=LAYOUTS)
def compared(request: pytest.FixtureRequest, runs: dict[str, list[RankRun]]) -> tuple[list[RankRun], SerialRun, Layout]:
    return runs[request.param], serial_run(LAYOUTS[request.param]), LAYOUTS[request.param]


Compared = tuple[list[RankRun], SerialRun, Layout]


def test_only_some_steps_of_the_serial_run_are_clipped() -> None:
    norms = serial_run(Layout()).grad_norms
    assert min(norms) < CLIP < max(norms)


def test_the_expert_parallel_model_computes_the_same_logits(compared: Compared) -> None:
    ranks, serial, _ = compared
    for run, logits in zip(ranks, serial.first_logits, strict=False):
        assert (run.first_logits - logits).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:compared up to a tie")
def test_losses_and_gradient_norms_equal_those_of_one_process_up_to_a_tie_between_experts(compared: Compared) -> None:
    ranks, serial, _ = compared
    expected = list(zip(serial.losses, serial.grad_norms, serial.aux_losses, strict=True))
    for run in ranks:
        scalars = [step.scalars for step in run.steps]
        found = [(s["total_loss"], norm, s["aux_loss"]) for s, norm in zip(scalars, run.grad_norms, strict=True)]
        assert_same_until_a_tie(found, expected, (run.routing, serial.routing), 1e-5)


def steps_before_tie(run: RankRun, serial: SerialRun) -> int:
    """Return the number of steps before rounding changes the selection of a token with nearly tied experts."""
    tie = first_tie(run.routing, serial.routing)
    return STEPS if tie is None else tie.step


def test_the_trained_model_equals_that_of_one_process(compared: Compared) -> None:
    ranks, serial, _ = compared
    for rank, run in enumerate(ranks):
        if steps_before_tie(run, serial) < STEPS:
            continue
        moved = (serial.last_logits[rank] - serial.first_logits[rank]).abs().max()
        assert (run.last_logits - serial.last_logits[rank]).abs().max() < 1e-3 * moved


def test_routing_statistics_equal_those_of_the_global_batch(compared: Compared) -> None:
    ranks, serial, _ = compared
    for run in ranks:
        for number in range(steps_before_tie(run, serial)):
            step = run.steps[number]
            assert step.scalars["router_entropy/moe_layer_0"] == pytest.approx(serial.entropies[number], rel=1e-5)
            np.testing.assert_allclose(step.load_MN, serial.loads[number], rtol=1e-6)


@pytest.mark.parametrize("name", REPLICATED_IN_MEMORY)
def test_the_weights_on_every_rank_equal_those_of_one_process(name: str, runs: dict[str, list[RankRun]]) -> None:
    layout, serial = LAYOUTS[name], serial_run(LAYOUTS[name])
    for rank, run in enumerate(runs[name]):
        if steps_before_tie(run, serial) < STEPS:
            continue
        expected = converted(serial.parameters, layout, rank)
        assert run.parameters.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(run.parameters[key], value, rtol=0, atol=2e-4), key


def converted(parameters: dict[str, Any], layout: Layout, rank: int) -> dict[str, Any]:
    """Rename and split the serial model's weights as in the expert-parallel model."""
    width = model_config(layout).moe_intermediate_size
    own = model_config(layout).num_experts // layout.expert
    mine = slice(rank % layout.expert * own, (rank % layout.expert + 1) * own)
    result = {}
    for name, value in parameters.items():
        block = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            result[f"{block}.w1"], result[f"{block}.w3"] = value[mine, :width], value[mine, width:]
        elif name.endswith("experts.down_proj"):
            result[f"{block}.w2"] = value[mine]
        else:
            result[name] = value
    return result


@pytest.mark.parametrize("name", REPLICATED_IN_MEMORY)
def test_replicated_weights_stay_bitwise_identical_on_all_ranks(name: str, runs: dict[str, list[RankRun]]) -> None:
    first, *others = runs[name]
    replicated = [key for key in first.parameters if not re.search(r"\.experts\.w[123]$", key)]
    hypernetwork = [key for key in replicated if "hypernetwork" in key or "hyper_experts" in key]
    assert bool(hypernetwork) == model_config(LAYOUTS[name]).hypernetwork
    for other in others:
        for key in replicated:
            assert torch.equal(first.parameters[key], other.parameters[key]), key


def test_recomputing_activations_changes_no_result_and_leaves_no_hooks(runs: dict[str, list[RankRun]]) -> None:
    for kept, recomputed in (("EP 2", "EP 2, recomputed"), ("EP 2, ZeRO 3", "EP 2, ZeRO 3, recomputed")):
        for one, other in zip(runs[kept], runs[recomputed], strict=True):
            assert [step.scalars for step in one.steps] == [step.scalars for step in other.steps]
            assert one.grad_norms == other.grad_norms
            assert (one.router_passes, other.router_passes) == (STEPS, 2 * STEPS)


def test_observing_the_router_leaves_no_hooks(compared: Compared) -> None:
    assert {run.hooks_left for run in compared[0]} == {0}
