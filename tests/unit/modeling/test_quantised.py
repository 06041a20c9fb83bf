"""Test the quantisation of all linear layers, including those of the hypernetwork."""

from typing import Any

import pytest
import torch
from model_references import build, distance, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from hypermoe_ds.export.bake import bake
from hypermoe_ds.modeling import HyperMoEForCausalLM

KINDS: dict[str, dict[str, Any]] = {
    "top-1": {"num_experts_per_tok": 1},
    "top-2 of 16": {"num_experts": 16},  # the cheaper form is "factored"
    "route": {"hyper_conditioning": "route"},
}
EVERY_KIND = pytest.mark.parametrize(("kind", "baked"), [*((kind, False) for kind in KINDS), ("top-1", True)])


class LinearOnly(Tensor):
    """Weight that, like a quantised one, supports `F.linear` but no views or other products."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.as_subclass(Tensor), *bias)
        if function in (Tensor.view, Tensor.reshape, Tensor.transpose, Tensor.t, Tensor.__matmul__, Tensor.data_ptr):
            raise NotImplementedError(function.__name__)
        return super().__torch_function__(function, types, args, kwargs)


def model_of(kind: str, baked: bool) -> HyperMoEForCausalLM:
    model = build(**KINDS[kind])
    return bake(model).eval() if baked else model


def check_lora_gradients(model: HyperMoEForCausalLM, ids: Tensor, baked: bool) -> None:
    """Add LoRA to all linear layers and check that every adapter has a gradient."""
    peft = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    peft.train()
    peft(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in peft.named_parameters() if "lora_B" in name}
    assert gradients
    assert baked or any("hypernetwork" in name for name in gradients)
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients.values())


@EVERY_KIND
def test_linear_weights_are_used_only_by_f_linear(kind: str, baked: bool) -> None:
    model, ids = model_of(kind, baked), tokens(2, 9)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().as_subclass(LinearOnly)
            module.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        assert distance(model(input_ids=ids).logits, plain) < 1e-5
    assert distance(model(input_ids=ids).logits, plain) < 1e-5, "the check must run with gradients"
    check_lora_gradients(model, ids, baked)


@EVERY_KIND
def test_int8_weights_change_logits_little_and_support_lora(kind: str, baked: bool) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, ids = model_of(kind, baked), tokens(2, 9)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        quantised = model(input_ids=ids).logits
    assert 0 < distance(quantised, plain) < 0.1
    assert distance(model(input_ids=ids).logits, quantised) < 1e-5, "the check must run with gradients"
    check_lora_gradients(model, ids, baked)
