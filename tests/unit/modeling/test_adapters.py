"""Adapters, hooks, replaced modules and changed weights take effect in the next forward pass."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_references import VARIANTS, build, distance, scale_up_generated_weights, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LogitsProcessor

from hypermoe_ds.modeling import HyperMoEForCausalLM
from hypermoe_ds.modeling import hyper_experts as module_under_test
from hypermoe_ds.modeling.generated import Assignment
from hypermoe_ds.modeling.hyper_costs import Form
from hypermoe_ds.modeling.hyper_experts import HyperNetwork

KINDS = {
    "top-1": VARIANTS["top-1"],
    "top-2": VARIANTS["plain"],
    "route": {"hyper_conditioning": "route"},
    "top-2 of 16": {"num_experts": 16},  # more possible selections than the cache keeps
}
LORA = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def with_lora(model: HyperMoEForCausalLM) -> PeftModel:
    """Add LoRA to every linear layer, including those of the hypernetwork and the encoders."""
    return get_peft_model(model, LORA).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_disabling_an_adapter_takes_effect_in_the_next_forward_pass(kind: str) -> None:
    model, ids = build(**KINDS[kind]), tokens(2, 9)
    base = logits_of(model, ids)
    peft = with_lora(model)
    with_adapter = logits_of(peft, ids)
    assert distance(with_adapter, base) > 0.1
    with peft.disable_adapter():
        assert distance(logits_of(peft, ids), base) < 1e-5
    assert torch.equal(logits_of(peft, ids), with_adapter)


def test_the_forward_pass_uses_the_active_adapter() -> None:
    peft, ids = with_lora(build()), tokens(2, 9)
    first = logits_of(peft, ids)
    peft.add_adapter("second", LORA)
    peft.set_adapter("second")
    second = logits_of(peft, ids)
    assert distance(second, first) > 0.1
    peft.set_adapter("default")
    assert torch.equal(logits_of(peft, ids), first)
    merged = peft.merge_and_unload()
    assert distance(logits_of(merged, ids), first) < 1e-5


@pytest.mark.parametrize("form", ["per_set", "factored", "per_token"])
def test_every_form_applies_adapters_on_the_weight_generating_layers(form: Form) -> None:
    hypernetwork = HyperNetwork(24, 14, 3, 5, 16, 10)
    scale_up_generated_weights(hypernetwork)
    lora = LoraConfig(target_modules=["down_weight", "up_weight"], init_lora_weights=False)
    peft = get_peft_model(copy.deepcopy(hypernetwork), lora)
    x, z, layers = torch.randn(40, 24), torch.randn(40, 14), torch.full((40,), 1)
    assignment = Assignment(torch.arange(40).unsqueeze(1))

    def value_and_gradient(network: nn.Module) -> tuple[Tensor, Tensor]:
        x.requires_grad_().grad = None
        y: Tensor = network(z, layers, x, assignment, form)
        y.square().sum().backward()
        return y, x.grad

    seen = value_and_gradient(peft)
    assert distance(seen[0], hypernetwork(z, layers, x, assignment, form)) > 0.1
    for value, expected in zip(seen, value_and_gradient(peft.merge_and_unload()), strict=True):
        assert distance(value, expected) < 1e-5


def _write_data(network: HyperNetwork) -> None:
    network.up_weight.weight.data.mul_(2)


def _parametrize(network: HyperNetwork) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(network.up_weight, "weight", Doubled())


def _hook(network: HyperNetwork) -> None:
    network.up_weight.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def _assign(network: HyperNetwork) -> None:
    network.load_state_dict({name: 2 * value for name, value in network.state_dict().items()}, assign=True)


def _swap(network: HyperNetwork) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, u: Tensor) -> Tensor:
            doubled: Tensor = 2 * self.inner(u)
            return doubled

    network.up_weight = Doubled(network.up_weight)  # type: ignore[assignment]


CHANGES = [_write_data, _parametrize, _hook, _assign, _swap]


@pytest.mark.parametrize("form", ["per_set", "factored"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_of_the_hypernetwork_take_effect_in_the_next_forward_pass(
    change: Callable[[HyperNetwork], None], form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "cheaper_form", lambda *_: form)
    ids = tokens(2, 9)
    used, fresh = build(), build()
    before = logits_of(used, ids)
    used.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    for model in (used, fresh):
        change(model.model.hypernetwork)
    # Reference: generate weights per token by calling the linear layers.
    for layer in fresh.model.layers:
        layer.hyper_experts.forward = _per_token(layer.hyper_experts)
    after = logits_of(used, ids)
    assert distance(after, before) > 0.05
    assert distance(after, logits_of(fresh, ids)) < 1e-5


def _per_token(hyper_experts: nn.Module) -> Callable[..., Tensor]:
    original = hyper_experts.forward

    def forward(x: Tensor, selected: Tensor, hypernetwork: HyperNetwork, **kwargs: Any) -> Tensor:
        kwargs.pop("generated")
        output: Tensor = original(x, selected, hypernetwork, "per_token", **kwargs)
        return output

    return forward


def test_functional_call_uses_its_weights_only_in_that_call() -> None:
    model, ids = build(**KINDS["top-1"]), tokens(2, 9)
    before = logits_of(model, ids)
    temporary = {name: 2 * value for name, value in model.state_dict().items() if "hypernetwork" in name}
    with torch.no_grad():
        during = torch.func.functional_call(model, temporary, (ids,)).logits
    expected = copy.deepcopy(model)
    expected.load_state_dict(temporary, strict=False)
    assert distance(during, logits_of(expected, ids)) < 1e-6
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_uses_the_active_adapter_between_and_within_calls(kind: str) -> None:
    model, ids = build(**KINDS[kind], tie_word_embeddings=False), tokens(1, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    base = model.generate(ids, **options)
    peft = with_lora(model)
    with_adapter = peft.generate(input_ids=ids, **options)
    assert not torch.equal(with_adapter, base)
    with peft.disable_adapter():
        assert torch.equal(peft.generate(input_ids=ids, **options), base)

    class Base(LogitsProcessor):
        """Logits processor that runs the base model within `generate`, as contrastive decoding does."""

        def __call__(self, input_ids: Tensor, _scores: Tensor) -> Tensor:
            with peft.disable_adapter():
                return logits_of(peft, input_ids)[:, -1]

    assert torch.equal(peft.generate(input_ids=ids, logits_processor=[Base()], **options), base)
    assert torch.equal(peft.generate(input_ids=ids, **options), with_adapter)


@pytest.mark.parametrize("kind", ["top-1", "route"])
def test_generate_calls_the_hypernetwork_only_once(kind: str) -> None:
    model, ids = build(**KINDS[kind]), tokens(1, 9)
    calls: list[int] = []
    model.model.hypernetwork.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        calls.clear()
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        assert len(calls) == 1


def test_a_custom_decoding_loop_does_not_use_the_cache_of_generate() -> None:
    model, ids = build(**KINDS["top-1"]), tokens(1, 9)
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    _write_data(model.model.hypernetwork)
    with torch.no_grad():
        custom = model(**model.prepare_inputs_for_generation(ids, use_cache=False)).logits
    assert distance(custom[:, -1], logits_of(model, ids)[:, -1]) < 1e-6


def test_recomputing_weights_in_backward_repeats_the_dropout_of_forward() -> None:
    hypernetwork = HyperNetwork(24, 14, 3, 5, 16, 10)
    scale_up_generated_weights(hypernetwork)
    lora = LoraConfig(target_modules=["down_weight", "up_weight"], init_lora_weights=False, lora_dropout=0.5)
    peft = get_peft_model(hypernetwork, lora)
    x, z, layers = torch.randn(40, 24), torch.randn(8, 14), torch.full((8,), 1)
    assignment = Assignment((torch.arange(40) % 8).unsqueeze(1))

    def gradient(recompute: bool) -> Tensor:
        x.requires_grad_().grad = None
        torch.manual_seed(3)
        y = peft(z, layers, x, assignment, "per_set", recompute)
        y.square().sum().backward()
        assert x.grad is not None
        return x.grad

    assert distance(gradient(recompute=True), gradient(recompute=False)) < 1e-6
