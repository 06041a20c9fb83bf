"""Losses and routing statistics of one optimizer step, over all micro-batches and ranks.

Shape legend: T tokens, N experts, K experts of a token, M MoE layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

from hypermoe_ds.modeling.selections import set_keys


@dataclass(frozen=True)
class StepStatistics:
    """Means over the micro-batches and ranks of one step.

    Attributes:
        scalars: name to value, as they go to the log.
        load_MN: share of each MoE layer's routed rows that each expert received.
    """

    scalars: dict[str, float]
    load_MN: Tensor


class StepMeter:
    """Adds up what the micro-batches of one step show, without a synchronisation until `read`."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._rows: list[Tensor] = []

    def add(self, output: Any) -> None:
        """Take the output of one forward pass made with `output_router_logits`."""
        losses = [output.loss, output.lm_loss, output.aux_loss, output.z_loss]
        zero = output.loss.new_zeros(())
        rows = [torch.stack([(zero if loss is None else loss).detach().float() for loss in losses])]
        norms = output.branch_norms or [torch.zeros(2, device=zero.device)] * len(output.router_logits)
        for logits_TN, selected_TK, norms_2 in zip(output.router_logits, output.selected_experts, norms, strict=True):
            rows.append(self._layer(logits_TN.detach(), selected_TK, norms_2))
        self._rows.append(torch.cat(rows))

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
        """Average over micro-batches and ranks (collective) and start anew."""
        mean = torch.stack(self._rows).mean(0)
        self._rows.clear()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        mean = mean.cpu()
        names = ("total_loss", "loss", "aux_loss", "z_loss")
        scalars = dict(zip(names, mean[:4].tolist(), strict=True))
        layers = mean[4:].view(-1, 3 + self._num_experts)
        load_MN = layers[:, 3:]
        for index, (entropy, ratio, sets) in enumerate(layers[:, :3].tolist()):
            scalars[f"router_entropy/moe_layer_{index}"] = entropy
            scalars[f"hyper_expert_norm_ratio/moe_layer_{index}"] = ratio
            scalars[f"distinct_sets/moe_layer_{index}"] = sets
            scalars[f"expert_load_max_over_mean/moe_layer_{index}"] = float(load_MN[index].max()) * self._num_experts
        return StepStatistics(scalars, load_MN)


def count_distinct(selected_TK: Tensor, num_experts: int) -> Tensor:
    """The number of distinct selections, exactly and without a synchronisation, unlike `torch.unique`.

    Args:
        selected_TK: expert indices, T > 0.
        num_experts: N.

    Returns:
        A scalar on the same device.
    """
    keys_WT = set_keys(selected_TK, num_experts).t()
    # Radix sort by words, after which equal selections are neighbours.
    order_T = keys_WT[0].argsort()
    for key_T in keys_WT[1:]:
        order_T = order_T[key_T[order_T].argsort(stable=True)]
    sorted_WT = keys_WT[:, order_T]
    return (sorted_WT[:, 1:] != sorted_WT[:, :-1]).any(0).sum() + 1
