"""Small models of Transformers classes, and comparisons of their logits with ours."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hypermoe_ds.export.streaming import streamed_logits
from hypermoe_ds.export.weight_loader import WeightLoader

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}
CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
SMALL_HYPER: dict[str, Any] = {
    "expert_embedding_size": 8,
    "selection_hidden_size": 8,
    "hypernetwork_input_size": 8,
    "bottleneck_size": 8,
    "adapter_size": 4,
}


def their_model(kind: str, **fields: Any) -> PreTrainedModel:
    """Build a small Transformers model with random norm weights, so that mixed-up norms change the logits."""
    torch.manual_seed(7)
    config_class, model_class = CLASSES[kind]
    model: PreTrainedModel = model_class(config_class(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def ids() -> Tensor:
    """Return random token ids, [2, 11]."""
    return torch.randint(0, SIZES["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=ids()).logits
    return logits


def largest_difference(weights: WeightLoader, theirs: PreTrainedModel) -> float:
    """Return the largest difference between our logits and those of Transformers. The logits are at most about 10."""
    return float((streamed_logits(weights, ids()) - their_logits(theirs)).abs().max())


def saved(model: PreTrainedModel, folder: Path, **arguments: Any) -> Path:
    model.save_pretrained(folder, **arguments)
    return folder
