"""The expert-parallel transformation: what DeepSpeed's AutoEP is told of the model, and the model's one hook."""

from typing import Any

import torch.distributed
from torch import Tensor

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM


def autoep_section(config: HyperMoEConfig, expert_parallel_size: int) -> dict[str, Any]:
    """The `expert_parallel` section of the DeepSpeed configuration.

    `deepspeed.initialize` then replaces each MoE block by an expert-parallel one, whatever the
    size: with one rank a group the experts stay whole and no token travels.
    """
    return {
        "enabled": True,
        "autoep_size": expert_parallel_size,
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
        "route_norm": config.renormalises_gates,
        "has_shared_experts": config.shared_expert_size > 0,
        "shared_experts_pattern": "shared_experts",
        "expert_activation": "swiglu",
        # Sequential GEMMs: on CPU the grouped path needs a Triton kernel's fallback and is no faster.
        "use_grouped_mm": torch.cuda.is_available(),
    }


def connect_ranks(model: HyperMoEForCausalLM) -> None:
    """Let the load-balancing loss count the tokens of all data-parallel ranks, if it is to."""
    if model.config.router_aux_loss_scope == "data_parallel":
        model.sum_over_ranks = _sum_over_ranks


def _sum_over_ranks(value: Tensor) -> Tensor:
    """Sum counts over all ranks; every rank is data-parallel."""
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total
