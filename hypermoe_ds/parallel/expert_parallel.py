"""Configure DeepSpeed's expert parallelism (AutoEP), and sum tensors over ranks."""

from typing import Any

import torch.distributed
from torch import Tensor

from hypermoe_ds.device import uses_gpu


def autoep_section(size: int, renormalises_gates: bool, has_shared_experts: bool) -> dict[str, Any]:
    """Return the `expert_parallel` section of the DeepSpeed configuration.

    With this section, `deepspeed.initialize` replaces each MoE block with an expert-parallel layer, even if `size` is
    1. In that case, the experts are not sharded, and ranks exchange no tokens.

    Args:
        size: number of ranks that share one copy of the experts.
        renormalises_gates: whether the gates of a token sum to one.
        has_shared_experts: whether the MoE blocks have a shared expert.
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
        # On CPU, the grouped path needs a fallback for a Triton kernel and is not faster than sequential GEMMs.
        "use_grouped_mm": uses_gpu(),
    }


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks (collective); all ranks are data-parallel."""
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total
