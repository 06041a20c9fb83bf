"""torch.compile and torch.export capture a forward pass as one graph with the same results."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from model_references import build, distance, random_selection, tokens
from torch import Tensor
from transformers import CompileConfig, StaticCache

from hypermoe_ds.export.bake import bake
from hypermoe_ds.modeling import HyperMoEForCausalLM
from hypermoe_ds.modeling.generated import Assignment, HyperExpertWeights, apply_generated

KINDS: dict[str, dict[str, Any]] = {
    "top-1": {"num_experts_per_tok": 1},
    "top-2 of 8, shared": {"num_experts": 8, "shared_expert_size": 12, "norm_topk_prob": True},
    "route": {"hyper_conditioning": "route"},
}


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(kind: str, baked: bool = False) -> HyperMoEForCausalLM:
    model = build(**KINDS[kind], num_hidden_layers=1)
    return bake(model).eval() if baked else model


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function into one graph whose operators run without code generation."""
    graph: Callable[..., Any] = torch.compile(function, fullgraph=True, backend="eager")
    return graph


@pytest.mark.parametrize(
    ("kind", "baked"), [("top-1", False), ("top-2 of 8, shared", False), ("top-1", True), ("route", True)]
)
def test_an_exported_program_gives_the_models_logits_at_every_length(kind: str, baked: bool) -> None:
    model = model_of(kind, baked)
    length = torch.export.Dim("length", min=2, max=60)
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens(2, 7), "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    ).module()
    for ids in (tokens(2, 7), tokens(2, 33), tokens(2, 2)):
        with torch.no_grad():
            assert distance(program(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits) < 1e-5


@pytest.mark.parametrize("baked", [False, True])
def test_prefill_and_decoding_compile_without_graph_breaks(baked: bool) -> None:
    model, ids = model_of("top-1", baked), tokens(2, 9)

    def logits_by_chunk(run: Callable[..., Any]) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=9)
        seen = []
        with torch.no_grad():
            for part in (slice(0, 7), slice(7, 8), slice(8, 9)):
                positions = torch.arange(9)[part].unsqueeze(0)
                seen.append(run(input_ids=ids[:, part], position_ids=positions, past_key_values=cache).logits)
        return torch.cat(seen, dim=1)

    compiled_logits, eager_logits = logits_by_chunk(compiled(model)), logits_by_chunk(model)
    assert distance(compiled_logits, eager_logits) < 1e-5
    with torch.no_grad():
        assert distance(eager_logits, model(input_ids=ids).logits) < 1e-5


def test_generate_decodes_with_one_graph_and_the_cached_hyper_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids, options = model_of("top-1"), tokens(2, 7), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    monkeypatch.setattr(HyperMoEForCausalLM, "_can_compile_fullgraph", True)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    plain = model.generate(ids, **options)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        text = model.generate(ids, cache_implementation="static", compile_config=compile_config, **options)
        assert torch.equal(text, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["top-2 of 8, shared", "route"])
def test_a_compiled_model_has_the_same_loss_and_gradients(kind: str) -> None:
    model, ids = model_of(kind), tokens(2, 9)

    def loss_and_gradient(run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for value, expected in zip(loss_and_gradient(compiled(model)), loss_and_gradient(model), strict=True):
        assert distance(value, expected) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_compiled_hyper_experts_are_exact(gated: bool) -> None:
    """Compare in fp64, because rounding could hide a small error."""
    U, D, A, J = 6, 12, 5, 3 if gated else 1
    shapes = {"down_weight": (U, D, A), "down_bias": (U, A), "up_weight": (U, A, D), "up_bias": (U, D)}
    weights = HyperExpertWeights(**{name: torch.randn(shape).double() for name, shape in shapes.items()})
    x, gates = torch.randn(20, D).double(), torch.rand(20, J).double() if gated else None
    assignment = Assignment(random_selection(20, U, J), gates)
    arguments = [x, *weights, *([] if gates is None else [gates])]
    for argument in arguments:
        argument.requires_grad_()

    def value_and_gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        y = run(x, assignment, weights)
        return [y, *torch.autograd.grad(y.square().sum(), arguments)]

    for value, expected in zip(
        value_and_gradients(compiled(apply_generated)), value_and_gradients(apply_generated), strict=True
    ):
        assert distance(value, expected) < 1e-13
