"""A baked model computes the same outputs as the model with its hypernetwork."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hypermoe_ds.errors import UserError
from hypermoe_ds.export.bake import bake
from hypermoe_ds.export.hf import read_model
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "first_dense_layers": 1,
    "bottleneck_size": 16,
    "adapter_size": 8,
}


def build(**overrides: Any) -> HyperMoEForCausalLM:
    torch.manual_seed(0)
    model = HyperMoEForCausalLM(HyperMoEConfig(**{**SIZES, "initializer_range": 0.2, **overrides}))
    with torch.no_grad():
        for head in ("down_weight", "down_bias", "up_weight", "up_bias"):
            model.model.hypernetwork.get_submodule(head).weight.mul_(1000)
    return model.eval()


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 3, "hyper_conditioning": "route"},
        {"num_experts_per_tok": 4, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_baked_model_gives_the_same_logits_and_text(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = build(**overrides)
    bake(model).save_pretrained(tmp_path)
    baked = read_model(tmp_path)
    ids = torch.randint(0, 61, (2, 9))
    expected = model(input_ids=ids).logits
    assert (baked(input_ids=ids).logits - expected).abs().max() < 1e-5
    assert not any("hypernetwork" in name or "encoder" in name for name, _ in baked.named_parameters())
    assert baked.num_parameters() == baked.config.parameter_counts().total
    text = [m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, baked)]
    assert torch.equal(*text)
    with torch.no_grad():
        baked.model.layers[1].hyper_experts.up_bias.add_(1.0)
    assert not torch.allclose(baked(input_ids=ids).logits, expected, atol=1e-3)


def test_models_that_cannot_be_baked_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--bake: 6 HyperExperts per layer are more than the 4 experts; bake a model"):
        bake(build(num_experts_per_tok=2))
    with pytest.raises(UserError, match="no hypernetwork"):
        bake(bake(build(num_experts_per_tok=1)))
