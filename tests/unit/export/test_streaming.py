"""Streaming a model computes the same logits as a model in memory, and keeps one layer in memory at a time."""

import weakref
from functools import partial
from typing import Any

import pytest
import torch

from hypermoe_ds.export.bake import bake_weights
from hypermoe_ds.export.streaming import streamed_logits
from hypermoe_ds.export.weight_loader import LazyWeights, weights_of
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from tests.unit.export.test_bake import SIZES

IDS = torch.arange(14).view(2, 7)


def model_of(**overrides: Any) -> HyperMoEForCausalLM:
    torch.manual_seed(4)
    return HyperMoEForCausalLM(HyperMoEConfig(**{**SIZES, "initializer_range": 0.2, **overrides})).eval()


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts_per_tok": 2},
        {"num_experts_per_tok": 2, "hyper_conditioning": "route", "shared_expert_size": 8, "qk_norm": True},
        {"tie_word_embeddings": False, "moe_every": 2, "first_dense_layers": 0},
        {"hypernetwork": False},
        {"first_dense_layers": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_streamed_model_gives_the_same_logits_as_in_memory(overrides: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(**overrides).to(dtype)
    assert torch.equal(streamed_logits(weights_of(model), IDS), model(input_ids=IDS).logits)


@torch.no_grad()
def test_a_baked_model_can_be_streamed() -> None:
    model = model_of()
    logits = streamed_logits(bake_weights(weights_of(model)), IDS)
    torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_only_tensors_of_the_current_layer_are_in_memory() -> None:
    model = model_of(num_hidden_layers=4, num_experts_per_tok=2)
    references: dict[str, weakref.ref[Any]] = {}

    def read(name: str) -> torch.Tensor:
        array = model.state_dict()[name].numpy().copy()
        if ".mlp." in name and ".encoder." not in name:
            layer = name.split(".")[2]
            alive = [other for other, reference in references.items() if reference() is not None]
            assert {other.split(".")[2] for other in alive} <= {layer}
            references[name] = weakref.ref(array)
        return torch.from_numpy(array)

    source = LazyWeights(model.config, model.dtype, {name: partial(read, name) for name in weights_of(model).shapes})
    streamed_logits(source, IDS)
    assert len(references) == 3 + 3 * 3
