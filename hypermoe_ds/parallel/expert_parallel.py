"""The expert-parallel transformation: what DeepSpeed's AutoEP is told of the model, and its sum over ranks."""

from typing import Any

import torch.distributed
from torch import Tensor


def autoep_section(size: int, renormalises_gates: bool, has_shared_experts: bool) -> dict[str, Any]:
    """The `expert_parallel` section of the DeepSpeed configuration.

    `deepspeed.initialize` then replaces each MoE block by an expert-parallel one, whatever the
    size: with one rank a group the experts stay whole and no token travels.

    Args:
        size: ranks that share one copy of the experts.
        renormalises_gates: whether a token's gates sum to one.
        has_shared_experts: whether the blocks have an expert that every token passes.
    """
    return {
        "enabled": True,
        "autoep_size": size,
        "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
        "router_pattern": "router",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "num_experts_attr": "num_experts",
        "top_k_attr": "num_experts_per_tok",
        "score_func": "softmax",
        "score_apply": "post",
        "route_norm": renormalises_gates,
        "has_shared_experts": has_shared_experts,
        "shared_experts_pattern": "shared_experts",
        "expert_activation": "swiglu",
        # Sequential GEMMs: on CPU the grouped path needs a Triton kernel's fallback and is no faster.
        "use_grouped_mm": torch.cuda.is_available(),
    }


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum counts over all ranks (collective); every rank is data-parallel."""
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total
