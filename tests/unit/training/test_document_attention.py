"""Test that per-document attention computes the same outputs and gradients as attention with a mask."""

import pytest
import torch
from torch import Tensor

from hypermoe_ds.data.loader import mask_documents
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.training.document_attention import PER_DOCUMENT

END = 1


def build(attention: str) -> HyperMoEForCausalLM:
    torch.manual_seed(0)
    model = HyperMoEForCausalLM(
        HyperMoEConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
            initializer_range=0.2,
        )
    )  # fmt: skip
    model.set_attn_implementation(attention)
    return model


def batch(share_of_ends: float) -> dict[str, Tensor]:
    tokens = torch.randint(2, 64, (3, 41), generator=torch.Generator().manual_seed(0))
    ends = torch.rand((3, 41), generator=torch.Generator().manual_seed(1)) < share_of_ends
    tokens = tokens.masked_fill(ends, END).numpy()
    labels, positions = map(torch.from_numpy, mask_documents(tokens[:, :-1], tokens[:, 1:], END))
    return {"input_ids": torch.from_numpy(tokens[:, :-1]), "position_ids": positions, "shift_labels": labels}


@pytest.mark.parametrize("share_of_ends", [0, 0.02, 0.3, 0.9])
def test_outputs_and_gradients_equal_those_with_a_mask(share_of_ends: float) -> None:
    models = [build(attention) for attention in ("sdpa", PER_DOCUMENT)]
    masked, per_document = (model(**batch(share_of_ends), use_cache=False) for model in models)
    assert (masked.logits - per_document.logits).abs().max() < 1e-4
    masked.loss.backward()
    per_document.loss.backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-6), name  # type: ignore[arg-type]


def test_generation_with_a_cache_equals_that_of_plain_attention() -> None:
    prompt = torch.tensor([[5, 6, END, 7]])
    plain, per_document = (
        build(attention).eval().generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for attention in ("sdpa", PER_DOCUMENT)
    )
    assert torch.equal(plain, per_document)
