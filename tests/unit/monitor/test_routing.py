"""Test the routing statistics of a step against NumPy."""

from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hypermoe_ds.monitor.routing import RoutingMeter, count_distinct
from tests.helpers.synchronisations import Synchronisations

T, MICRO_BATCHES, LAYERS = 40, 3, 2


@dataclass
class Case:
    """Outputs of the micro-batches of one step, as NumPy arrays."""

    logits: Any
    selected: Any
    norms: Any


def case(experts: int, chosen: int, seed: int = 0) -> Case:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(MICRO_BATCHES, LAYERS, T, experts)) * 2
    selected = np.argsort(-logits, axis=-1)[..., :chosen]
    return Case(
        logits=logits,
        selected=generator.permuted(selected, axis=-1),
        norms=generator.random((MICRO_BATCHES, LAYERS, 2)) + 0.1,
    )


def outputs(step: Case, with_hyper_experts: bool = True) -> list[Any]:
    norms = [tuple(torch.tensor(layer).float() for layer in norms) for norms in step.norms]
    return [
        SimpleNamespace(
            loss=torch.tensor(1.0),
            router_logits=tuple(torch.tensor(layer, requires_grad=True) for layer in step.logits[number]),
            selected_experts=tuple(torch.tensor(layer) for layer in step.selected[number]),
            hyper_expert_norms=norms[number] if with_hyper_experts else None,
        )
        for number in range(MICRO_BATCHES)
    ]


def read(step: Case, experts: int, **kwargs: Any) -> Any:
    meter = RoutingMeter(experts)
    for output in outputs(step, **kwargs):
        meter.add(output)
    return meter.read()


@pytest.mark.parametrize(("experts", "chosen"), [(4, 1), (8, 2), (3, 3), (70, 3)])
def test_statistics_are_means_over_micro_batches(experts: int, chosen: int) -> None:
    step = case(experts, chosen)
    statistics = read(step, experts)
    scalars = statistics.scalars
    for layer in range(LAYERS):
        probabilities = np.exp(step.logits[:, layer])
        probabilities /= probabilities.sum(-1, keepdims=True)
        entropy = -(probabilities * np.log(probabilities)).sum(-1).mean()
        assert scalars[f"router_entropy/moe_layer_{layer}"] == pytest.approx(entropy, rel=1e-5)

        load = [np.mean(step.selected[:, layer] == expert) for expert in range(experts)]
        np.testing.assert_allclose(statistics.load_MN[layer], load, rtol=1e-5)
        assert scalars[f"expert_load_max_over_mean/moe_layer_{layer}"] == pytest.approx(max(load) * experts, rel=1e-5)
        assert scalars[f"expert_load_min_over_mean/moe_layer_{layer}"] == pytest.approx(min(load) * experts, rel=1e-5)
        assert scalars[f"experts_without_tokens/moe_layer_{layer}"] == load.count(0)

        counts = [len({frozenset(token) for token in part[layer].tolist()}) for part in step.selected]
        assert scalars[f"distinct_selections/moe_layer_{layer}"] == pytest.approx(np.mean(counts))

        ratio = (step.norms[:, layer, 1] / step.norms[:, layer, 0]).mean()
        assert scalars[f"hyper_expert_norm_ratio/moe_layer_{layer}"] == pytest.approx(ratio, rel=1e-5)


def test_read_resets_the_meter() -> None:
    meter = RoutingMeter(4)
    for seed in (1, 2):
        step = case(4, 2, seed)
        for output in outputs(step):
            meter.add(output)
        assert meter.read().scalars == read(step, 4).scalars


def test_moe_without_hyper_experts_has_no_norm_ratio() -> None:
    with_them, without = (read(case(4, 2), 4, with_hyper_experts=has_norms).scalars for has_norms in (True, False))
    ratios = {f"hyper_expert_norm_ratio/moe_layer_{layer}" for layer in range(LAYERS)}
    assert with_them.keys() - without.keys() == ratios
    assert without == pytest.approx({key: with_them[key] for key in without})


def test_dense_model_has_no_routing_statistics() -> None:
    meter = RoutingMeter(4)
    meter.add(SimpleNamespace(loss=torch.tensor(2.0), router_logits=(), selected_experts=(), hyper_expert_norms=None))
    statistics = meter.read()
    assert statistics.scalars == {}
    assert statistics.load_MN.numel() == 0


@pytest.mark.parametrize(("expert", "layer"), list(product((0, 3), (0, 1))))
def test_statistics_show_a_collapsed_router(expert: int, layer: int) -> None:
    step = case(4, 1)
    step.selected[:, layer] = expert
    step.logits[:, layer] = -50
    step.logits[:, layer, :, expert] = 50
    scalars = read(step, 4).scalars
    assert scalars[f"expert_load_max_over_mean/moe_layer_{layer}"] == pytest.approx(4)
    assert scalars[f"router_entropy/moe_layer_{layer}"] == pytest.approx(0, abs=1e-6)
    assert scalars[f"distinct_selections/moe_layer_{layer}"] == 1


@pytest.mark.parametrize(
    ("experts", "chosen"), [(1, 1), (8, 1), (8, 2), (62, 1), (63, 1), (64, 8), (100, 2), (125, 1), (128, 3), (128, 128)]
)
@pytest.mark.parametrize("tokens", [1, 500])
def test_count_distinct_matches_python_sets(experts: int, chosen: int, tokens: int) -> None:
    generator = np.random.default_rng(tokens)
    scores = generator.normal(size=(tokens, experts)).argsort(-1)
    selected = torch.tensor(scores[:, :chosen].copy())
    few = selected[torch.tensor(generator.integers(0, max(1, tokens // 7), size=tokens))]  # repeated selections
    # These sets differ in one expert, whose bit may be in any word of the key.
    near = torch.arange(chosen).repeat(experts - chosen + 1, 1)
    near[:, -1] = torch.arange(chosen - 1, experts)
    for rows in (selected, few, near, torch.cat([near, selected, near.flip(0).flip(1)])):
        assert count_distinct(rows, experts).item() == len({frozenset(row) for row in rows.tolist()})


@pytest.mark.parametrize(("experts", "chosen"), [(4, 1), (8, 2), (70, 3)])
def test_adding_a_micro_batch_does_not_wait_for_the_device(experts: int, chosen: int) -> None:
    meter = RoutingMeter(experts)
    with Synchronisations() as waits:
        for output in outputs(case(experts, chosen)):
            waits.seen.clear()  # ignore the synchronisations that created the output
            meter.add(output)
            assert waits.seen == []
        meter.read()
    assert "_local_scalar_dense" in waits.seen
