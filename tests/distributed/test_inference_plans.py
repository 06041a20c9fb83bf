"""Transformers shards an exported model as the tensor- and expert-parallel plans in its configuration specify."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from tests.distributed.inference_runs import load_and_run
from tests.helpers.ranks import run_on_ranks

SMALL = {
    "vocab_size": 61,  # rank 0 has 31 rows of the embedding, and rank 1 has 30
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_embedding_size": 7,
    "selection_hidden_size": 9,
    "hypernetwork_input_size": 6,
    "layer_embedding_size": 5,
    "bottleneck_size": 11,
    "adapter_size": 8,
    "initializer_range": 0.2,
}
ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
SWIGLU = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
# Settings of each case, and the names of the weights that are sharded in layers 0 and 1.
CASES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "dense and shared, untied": (
        {"first_dense_layers": 1, "shared_expert_size": 12, "tie_word_embeddings": False},
        ATTENTION | {f"mlp.{name}" for name in SWIGLU},
        ATTENTION | EXPERTS | {f"mlp.shared_experts.{name}" for name in SWIGLU},
    ),
    "norm of each head, top-1": ({"qk_norm": True, "num_experts_per_tok": 1}, ATTENTION | EXPERTS, ATTENTION | EXPERTS),
    "norm over all heads": ({"qk_norm": True, "qk_norm_scope": "all_heads"}, ATTENTION | EXPERTS, ATTENTION | EXPERTS),
}


def saved(settings: dict[str, Any], folder: Path) -> HyperMoEForCausalLM:
    """Save a model whose HyperExperts and norms affect the output noticeably."""
    torch.manual_seed(0)
    model = HyperMoEForCausalLM(HyperMoEConfig(**{**SMALL, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hypernetwork.up" in name or "hypernetwork.down" in name:
                parameter.mul_(1000)
            if "q_norm" in name or "k_norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[HyperMoEForCausalLM, Tensor, list[dict[str, Any]]]]:
    """Return, for each case, the model, the token ids and the results of both ranks."""
    folder = tmp_path_factory.mktemp("split")
    models = {name: saved(case[0], folder / name) for name, case in CASES.items()}
    ids = torch.randint(0, 61, (2, 9))
    ranks = run_on_ranks(2, load_and_run, [folder / name for name in CASES], ids, {"tp_size": 2})
    return {name: (models[name], ids, list(found)) for name, *found in zip(CASES, *ranks, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_a_model_sharded_over_two_ranks_gives_the_same_logits_and_text(name: str, runs: Any) -> None:
    model, ids, found = runs[name]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    text = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert expected.std() > 0.1
    for rank in found:
        assert torch.allclose(rank["logits"], expected, atol=1e-5)
        assert torch.equal(rank["text"], text)


def test_a_model_with_half_of_the_experts_on_each_rank_gives_the_same_logits(tmp_path: Path) -> None:
    settings = {"first_dense_layers": 1, "shared_expert_size": 12}
    model, ids = saved(settings, tmp_path), torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for (rank,) in run_on_ranks(2, load_and_run, [tmp_path], ids, {"tp_size": 2, "ep_size": 2}):
        assert torch.allclose(rank["logits"], expected, atol=1e-5)
        assert {f"model.layers.1.{name}" for name in EXPERTS} < set(rank["split"])


@pytest.mark.parametrize("name", CASES)
def test_each_rank_has_half_of_the_attention_mlp_and_embedding_weights(name: str, runs: Any) -> None:
    _, first, second = CASES[name]
    split = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if "untied" in name else set())
    split |= {f"model.layers.{i}.{part}" for i, layer in enumerate((first, second)) for part in layer}
    for rank in runs[name][2]:
        assert set(rank["split"]) == split
        assert rank["share"] == pytest.approx(0.5, abs=0.01)
