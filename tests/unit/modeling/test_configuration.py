import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_references import SMALL, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hypermoe_ds.modeling import PRESETS, HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling import hyper_experts as hyper_experts_module

ODD_SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "MoE every 2": {"moe_every": 2, "num_hidden_layers": 5},
    "first dense": {"first_dense_layers": 2, "num_hidden_layers": 4},
    "first dense and every 3": {"first_dense_layers": 1, "moe_every": 3, "num_hidden_layers": 8},
    "all dense": {"first_dense_layers": 3},
    "shared expert": {"shared_expert_size": 13},
    "qk-norm": {"qk_norm": True},
    "qk-norm over all heads": {"qk_norm": True, "qk_norm_scope": "all_heads", "head_dim": 6},
    "untied": {"tie_word_embeddings": False},
    "plain": {"hypernetwork": False, "num_experts_per_tok": 1},
    "multi-query": {"num_key_value_heads": 1},
    "no grouped queries": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 22},
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 4},
    "derived width": {"intermediate_size": 0, "moe_every": 2},
    "combined": {
        "first_dense_layers": 1,
        "moe_every": 2,
        "num_hidden_layers": 6,
        "shared_expert_size": 5,
        "qk_norm": True,
        "tie_word_embeddings": False,
        "head_dim": 6,
        "num_experts": 9,
        "num_experts_per_tok": 3,
    },
}
MODELS = {**PRESETS, **{name: {**SMALL, **overrides} for name, overrides in ODD_SHAPES.items()}}


def parameters(model: HyperMoEForCausalLM) -> Iterator[tuple[str, int]]:
    return ((name, parameter.numel()) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_match_the_model(name: str) -> None:
    config = HyperMoEConfig(**MODELS[name])
    with torch.device("meta"):
        model = HyperMoEForCausalLM(config)
    counts = config.parameter_counts()
    assert counts.total == sum(size for _, size in parameters(model))
    assert counts.hypernetwork == sum(size for key, size in parameters(model) if "hyper" in key)
    experts = sum(size for key, size in parameters(model) if ".experts." in key)
    N, K = config.num_experts, config.num_experts_per_tok
    assert experts * K % N == 0
    assert counts.active == counts.total - experts + experts * K // N


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_active_parameters_are_those_that_one_token_uses(name: str) -> None:
    model = build(**ODD_SHAPES[name])
    output = model(input_ids=torch.tensor([[3]]), shift_labels=torch.tensor([[5]]))
    output.lm_loss.backward()
    active = 0
    for key, parameter in model.named_parameters():
        if ".experts." in key:
            active += sum(part.numel() for part in parameter.grad if part.any())
        else:
            assert parameter.grad is not None
            active += parameter.numel()
    assert model.config.parameter_counts().active == active


@pytest.mark.parametrize(
    ("name", "total", "active", "experts"),
    [
        ("tiny-10m", (9e6, 12e6), (2e6, 6e6), 8),
        ("gpt2-small-8e", (500e6, 560e6), (130e6, 140e6), 8),
        ("3b-a0.4b", (2.7e9, 3.3e9), (0.35e9, 0.45e9), 32),
        ("7b-a1b", (6.5e9, 7.5e9), (0.9e9, 1.6e9), 64),
    ],
)
def test_presets_have_the_size_in_their_name(
    name: str, total: tuple[float, float], active: tuple[float, float], experts: int
) -> None:
    config = HyperMoEConfig(**PRESETS[name])
    counts = config.parameter_counts()
    assert total[0] < counts.total < total[1]
    assert active[0] < counts.active < active[1]
    assert config.num_experts == experts
    assert config.hypernetwork


def test_the_gpt2_preset_has_the_shape_of_gpt2_small() -> None:
    config = HyperMoEConfig(**PRESETS["gpt2-small-8e"])
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.head_dim)
    assert shape == (768, 12, 12, 64)
    published = (
        config.expert_embedding_size,
        config.selection_hidden_size,
        config.hypernetwork_input_size,
        config.bottleneck_size,
        config.adapter_size,
        config.layer_embedding_size,
    )
    assert published == (128, 128, 128, 128, 64, 10)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_experts_per_tok": 1},
        {"hypernetwork": False},
        {"first_dense_layers": 1, "moe_every": 2, "num_hidden_layers": 6, "shared_expert_size": 10},
        {"num_key_value_heads": 4, "head_dim": 6, "qk_norm": True, "tie_word_embeddings": False},
        {"first_dense_layers": 3},
        {"num_experts_per_tok": 4},
    ],
    ids=str,
)
def test_flops_formula_counts_the_matrix_products_of_a_forward_pass(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hyper_experts_module, "cheaper_form", lambda *_: "per_set")
    model = build(**overrides)
    config, B, S = model.config, 3, 10
    selections: list[int] = []
    hyper_experts = [layer.hyper_experts for layer in model.model.layers if layer.hyper_experts is not None]
    for part in hyper_experts:
        part.encoder.register_forward_hook(lambda _module, inputs, _output: selections.append(len(inputs[0])))
    # FlopCounterMode counts attention only if separate matrix products compute it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 61, (B, S)))
    assert len(selections) == (len(config.moe_layers) if config.hypernetwork else 0)
    by_formula = B * S * config.forward_flops_per_token(S) + sum(config.generation_flops(count) for count in selections)
    assert counter.get_total_flops() == by_formula


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        *((key, 0, {}) for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")),
        *((key, 0, {}) for key in ("num_key_value_heads", "max_position_embeddings", "moe_every", "num_experts")),
        *((key, 0, {}) for key in ("num_experts_per_tok", "moe_intermediate_size", "expert_embedding_size")),
        *((key, 0, {}) for key in ("selection_hidden_size", "hypernetwork_input_size", "layer_embedding_size")),
        *((key, 0, {}) for key in ("bottleneck_size", "adapter_size")),
        *((key, -1, {}) for key in ("first_dense_layers", "shared_expert_size", "head_dim", "intermediate_size")),
        *((key, -0.5, {}) for key in ("router_aux_loss_coef", "z_loss_coef")),
        ("num_experts_per_tok", 5, {"num_experts": 4}),
        ("num_key_value_heads", 3, {"num_attention_heads": 4}),
        ("head_dim", 7, {}),
        ("first_dense_layers", 4, {"num_hidden_layers": 3}),
        ("num_attention_heads", 6, {"num_key_value_heads": 3}),
        ("num_attention_heads", 64, {}),
        ("router_aux_loss_scope", "global", {}),
        ("qk_norm_scope", "layer", {}),
    ],
)
def test_invalid_values_are_refused_with_a_remedy(key: str, value: Any, others: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{key}={re.escape(str(value))}: [^;\n]+; [^;\n]+$"):
        HyperMoEConfig(**{**SMALL, **others, key: value})


NUMBERS = {key: kind for key, kind in HyperMoEConfig.__annotations__.items() if kind in (int, float)}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_must_be_finite_of_their_type_and_within_limits(key: str) -> None:
    for value in (math.nan, math.inf, -math.inf, -1, 1e300, 10**30, "8", True, None):
        with pytest.raises(ValueError, match=rf"^{key}='?{re.escape(str(value))}'?: [^;\n]+; give [^;\n]+$"):
            HyperMoEConfig(**{**SMALL, key: value})


def test_booleans_must_be_true_or_false() -> None:
    with pytest.raises(ValueError, match=r"^qk_norm=1: is not a boolean; give true or false$"):
        HyperMoEConfig(**{**SMALL, "qk_norm": 1})


def test_errors_quote_the_setting_that_sets_the_limit() -> None:
    for overrides, other in (
        ({"num_experts_per_tok": 5}, "num_experts=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4"),
        ({"first_dense_layers": 4}, "num_hidden_layers=3"),
    ):
        with pytest.raises(ValueError, match=other):
            HyperMoEConfig(**{**SMALL, **overrides})


@pytest.mark.parametrize(
    ("layers", "first_dense", "every", "expected"),
    [
        (4, 0, 1, [0, 1, 2, 3]),
        (4, 1, 1, [1, 2, 3]),
        (4, 4, 1, []),
        (6, 0, 2, [1, 3, 5]),
        (6, 1, 2, [2, 4]),
        (7, 1, 2, [2, 4, 6]),
        (8, 2, 3, [4, 7]),
        (3, 0, 3, [2]),
        (1, 0, 1, [0]),
    ],
)
def test_every_nth_layer_after_the_dense_ones_is_an_moe_layer(
    layers: int, first_dense: int, every: int, expected: list[int]
) -> None:
    overrides = {"num_hidden_layers": layers, "first_dense_layers": first_dense, "moe_every": every}
    config = HyperMoEConfig(**{**SMALL, **overrides})
    assert config.moe_layers == expected
    with torch.device("meta"):
        model = HyperMoEForCausalLM(config)
    names = [name for name, _ in model.named_modules()]
    assert [i for i in range(layers) if f"model.layers.{i}.mlp.experts" in names] == expected
    assert [i for i in range(layers) if f"model.layers.{i}.hyper_experts" in names] == expected


def test_derived_sizes_are_saved_and_loaded(tmp_path: Any) -> None:
    config = HyperMoEConfig(**{**SMALL, "intermediate_size": 0})
    assert (config.head_dim, config.intermediate_size) == (8, 128)
    config.save_pretrained(tmp_path)
    again = HyperMoEConfig.from_pretrained(tmp_path)
    for key in HyperMoEConfig.__annotations__:
        assert getattr(again, key) == getattr(config, key), key
    assert again.parameter_counts() == config.parameter_counts()


def test_gates_are_never_renormalised_for_one_expert_per_token() -> None:
    for top_k, requested, expected in ((1, True, False), (1, False, False), (2, True, True), (2, False, False)):
        config = HyperMoEConfig(**{**SMALL, "num_experts_per_tok": top_k, "norm_topk_prob": requested})
        assert config.renormalises_gates is expected
        assert config.norm_topk_prob is requested
