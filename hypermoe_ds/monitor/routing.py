"""Compute routing statistics of an optimizer step over all micro-batches and ranks.

Shape legend: T tokens, N experts, K experts of a token, M MoE layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

from hypermoe_ds.modeling.selections import selection_keys


@dataclass(frozen=True)
class StepStatistics:
    """Routing statistics of one step, over its micro-batches and all ranks.

    Attributes:
        scalars: metrics by key.
        load_MN: share of each MoE layer's routed rows that each expert received.
    """

    scalars: dict[str, float]
    load_MN: Tensor


class RoutingMeter:
    """Sum the routing statistics of a step's micro-batches, without waiting for the device until `read`.

    Args:
        num_experts: N.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._rows: list[Tensor] = []
        self._has_hyper_experts = False

    def add(self, output: Any) -> None:
        """Add the output of a forward pass that ran with `output_router_logits`."""
        layers = len(output.router_logits)
        self._has_hyper_experts = output.hyper_expert_norms is not None
        norms = output.hyper_expert_norms or [output.loss.new_ones(2)] * layers
        for logits_TN, selected_TK, norms_2 in zip(output.router_logits, output.selected_experts, norms, strict=True):
            self._rows.append(self._layer(logits_TN.detach(), selected_TK, norms_2))
        self._layers = layers

    def _layer(self, logits_TN: Tensor, selected_TK: Tensor, norms_2: Tensor) -> Tensor:
        log_probability_TN = F.log_softmax(logits_TN.float(), dim=-1)
        entropy = -(log_probability_TN.exp() * log_probability_TN).sum(-1).mean()
        member_TN = torch.zeros_like(logits_TN, dtype=torch.long).scatter_(1, selected_TK, 1)
        load_N = member_TN.sum(0) / selected_TK.numel()  # bincount would wait for the device
        ratio = norms_2[1] / norms_2[0].clamp_min(1e-20)
        return torch.cat(
            [torch.stack([entropy, ratio, count_distinct(selected_TK, self._num_experts).float()]), load_N]
        )

    def read(self) -> StepStatistics:
        """Return averages over micro-batches and ranks since the last call (collective); empty for a dense model."""
        if not self._rows:
            return StepStatistics({}, torch.empty(0, self._num_experts))
        mean = torch.stack(self._rows).view(-1, self._layers, 3 + self._num_experts).mean(0)
        self._rows.clear()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        mean = mean.cpu()
        load_MN = mean[:, 3:]
        scalars: dict[str, float] = {}
        for layer, (entropy, ratio, selections) in enumerate(mean[:, :3].tolist()):
            relative_N = load_MN[layer] * self._num_experts
            values = {
                "router_entropy": entropy,
                "distinct_selections": selections,
                "expert_load_max_over_mean": float(relative_N.max()),
                "expert_load_min_over_mean": float(relative_N.min()),
                "experts_without_tokens": int((relative_N == 0).sum()),
            }
            if self._has_hyper_experts:
                values["hyper_expert_norm_ratio"] = ratio
            scalars |= {f"{name}/moe_layer_{layer}": value for name, value in values.items()}
        return StepStatistics(scalars, load_MN)


def count_distinct(selected_TK: Tensor, num_experts: int) -> Tensor:
    """Count the distinct selections exactly and, unlike `torch.unique`, without waiting for the device.

    Args:
        selected_TK: expert indices, T > 0.
        num_experts: N.

    Returns:
        A scalar on the same device.
    """
    keys_WT = selection_keys(selected_TK, num_experts).t()
    # Sort by one word of the key at a time (radix sort), so that equal selections become neighbours.
    order_T = keys_WT[0].argsort()
    for key_T in keys_WT[1:]:
        order_T = order_T[key_T[order_T].argsort(stable=True)]
    sorted_WT = keys_WT[:, order_T]
    return (sorted_WT[:, 1:] != sorted_WT[:, :-1]).any(0).sum() + 1
