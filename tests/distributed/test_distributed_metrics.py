"""Metrics computed over several ranks equal those of a naive computation or of one process."""

import pytest
import torch
from metric_runs import NEW_TOKENS, PROMPT, evaluate_each, measure_each, serial_gradient_norms
from small_runs import SEED, SMALL, Layout, training_tokens, wake_hypernetwork

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from tests.helpers.ranks import run_on_ranks

NORMS = {
    "EP 1": Layout(),
    "EP 2": Layout(expert=2),
    "EP 2, accumulation": Layout(expert=2, accumulation=2),
    "ZeRO 2, EP 2, accumulation": Layout(expert=2, stage=2, accumulation=2),
    "ZeRO 3": Layout(stage=3),
    "ZeRO 3, EP 2, accumulation": Layout(expert=2, stage=3, accumulation=2),
    "bf16": Layout(expert=2, precision="bf16"),
    "bf16, added up in fp32": Layout(accumulation=2, precision="bf16", accumulate="fp32"),
    "bf16, added up in fp32, EP 2": Layout(expert=2, accumulation=2, precision="bf16", accumulate="fp32"),
    "bf16, ZeRO 3": Layout(stage=3, precision="bf16"),
}
SHOWN = {
    "EP 2": Layout(expert=2),
    "ZeRO 3": Layout(stage=3),
    "ZeRO 3, EP 2": Layout(expert=2, stage=3, form="per_set"),
}


def test_norms_by_group_equal_those_of_the_full_gradient_and_of_the_weight_changes() -> None:
    for ranks in run_on_ranks(2, measure_each, list(NORMS.values())):
        for name, steps in zip(NORMS, ranks, strict=True):
            for step in steps:
                total = sum(norm**2 for norm in step.gradients.values()) ** 0.5
                assert total == pytest.approx(step.global_norm, rel=2e-3 if "bf16" in name else 1e-5), name
                assert step.weights == pytest.approx(step.expected, rel=1e-3), name


def test_gradient_norms_by_group_equal_those_of_one_process() -> None:
    exact = [layout for layout in NORMS.values() if layout.precision == "fp32" and layout.accumulation == 1]
    expected = run_on_ranks(1, _serial)[0]
    for ranks in run_on_ranks(2, measure_each, exact):
        for steps in ranks:
            assert steps[0].gradients == pytest.approx(expected, rel=1e-4)


def _serial() -> dict[str, float]:
    wake_hypernetwork()
    return serial_gradient_norms()


def _serial_model(**changes: object) -> HyperMoEForCausalLM:
    """Build the model of the runs on one process. `changes` can remove the hypernetwork but keep the other weights."""
    wake_hypernetwork()
    torch.manual_seed(SEED)
    whole = HyperMoEForCausalLM(HyperMoEConfig(**SMALL)).eval()
    if not changes:
        return whole
    other = HyperMoEForCausalLM(HyperMoEConfig(**SMALL | changes)).eval()
    other.load_state_dict(whole.state_dict(), strict=False)
    return other


@torch.no_grad()
def _references() -> tuple[torch.Tensor, list[int]]:
    """Return logits and a greedy continuation for comparison.

    The logits come from a model without a hypernetwork. Transformers generates the text from a model with one.
    """
    probe = training_tokens()[0, :2, :-1]
    without = _serial_model(hypernetwork=False)(input_ids=probe, use_cache=False).logits
    generated = _serial_model().generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return without, generated[0, len(PROMPT) :].tolist()


def test_similarity_contribution_and_samples_equal_naive_computations() -> None:
    [(without, tokens)] = run_on_ranks(1, _references)
    for ranks in run_on_ranks(2, evaluate_each, list(SHOWN.values())):
        for name, results in zip(SHOWN, ranks, strict=True):
            assert list(results.similarity) == [f"hyper_expert_similarity/moe_layer_{layer}" for layer in range(2)]
            assert list(results.similarity.values()) == pytest.approx(results.pairs, abs=1e-5), name
            assert torch.allclose(results.without, without, atol=1e-4), name
            assert not torch.allclose(results.without, results.again[0], atol=1e-2), name
            assert torch.equal(*results.again), name
            assert results.tokens == tokens, name
