"""Measure the similarity between the HyperExperts of different selections."""

import math
import random
from itertools import combinations

import torch
from torch import Tensor

from hypermoe_ds.modeling.hyper_experts import HyperExperts, HyperNetwork

_SAMPLE = 16  # number of selections to compare


def sample_selections(num_experts: int, size: int) -> list[tuple[int, ...]]:
    """Return up to 16 different sets of `size` experts, the same sets in every call and on every rank."""
    if math.comb(num_experts, size) <= _SAMPLE:
        return list(combinations(range(num_experts), size))
    generator = random.Random(0)  # noqa: S311 (not for secrets)
    chosen: set[tuple[int, ...]] = set()
    while len(chosen) < _SAMPLE:
        chosen.add(tuple(sorted(generator.sample(range(num_experts), size))))
    return sorted(chosen)


@torch.no_grad()
def hyper_expert_similarity(layers: list[HyperExperts], hypernetwork: HyperNetwork, top_k: int) -> dict[str, float]:
    """Return `hyper_expert_similarity/moe_layer_I`: the mean cosine similarity of different selections' HyperExperts.

    The down and up matrices of a HyperExpert are compared as one vector. All ranks must call this function, because the
    parameters of the hypernetwork may be sharded. If only one selection is possible, the result is empty.

    Args:
        layers: the HyperExperts of all MoE layers.
        hypernetwork: the hypernetwork that the layers share.
        top_k: number of experts per token.
    """
    selections = sample_selections(layers[0].num_experts, layers[0].set_size(top_k))
    if len(selections) < 2:
        return {}
    means = [_mean_cosine(_generate(layer, hypernetwork, selections)) for layer in layers]
    return {f"hyper_expert_similarity/moe_layer_{i}": mean for i, mean in enumerate(torch.stack(means).tolist())}


def _generate(layer: HyperExperts, hypernetwork: HyperNetwork, selections: list[tuple[int, ...]]) -> Tensor:
    """Generate the weights of one layer, [U, 2 * D * A]."""
    device = next(hypernetwork.parameters()).device
    z_UH = layer.encoder(torch.tensor(selections, device=device))
    layer_U = torch.full((len(selections),), layer.layer_index, device=device)
    weights = hypernetwork(z_UH, layer_U)
    return torch.cat([weights.down_weight.flatten(1), weights.up_weight.flatten(1)], dim=1).float()


def _mean_cosine(vectors_UW: Tensor) -> Tensor:
    """Return the mean cosine of all pairs of rows; the squared norm of the sum of unit rows counts each pair twice."""
    unit_UW = torch.nn.functional.normalize(vectors_UW, dim=1)
    count = len(unit_UW)
    return (unit_UW.sum(0).square().sum() - unit_UW.square().sum()) / (count * (count - 1))
