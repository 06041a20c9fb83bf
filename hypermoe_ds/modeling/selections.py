"""Enumerate all possible sets of selected experts, and find the set of each token.

Shape legend: T tokens, N experts, K experts per set, U distinct sets, C = C(N, K) possible sets, W words per key.
"""

import math

import torch
from torch import Tensor

_BITS_PER_WORD = 64  # bits of an int64, including the sign bit


def all_selections(num_experts: int, set_size: int, device: torch.device) -> Tensor:
    """Return every set of `set_size` experts; row i has rank i in colexicographic order.

    The sets are computed on the device without synchronisation. All sets must fit into memory.

    Returns:
        sets_CK, with the experts of each row in ascending order.
    """
    binomials = _binomials(num_experts, set_size, device)
    rest_C = torch.arange(math.comb(num_experts, set_size), device=device)
    experts = []
    for column_N in reversed(binomials):  # begin with the largest expert index of each set
        expert_C = torch.searchsorted(column_N, rest_C, right=True) - 1
        rest_C = rest_C - column_N[expert_C]
        experts.append(expert_C)
    return torch.stack(experts[::-1], dim=1)


def selection_ids(selected_TK: Tensor, num_experts: int) -> Tensor:
    """Return each token's row in `all_selections`, for any order of the experts and without synchronisation.

    A set {c_1 < ... < c_K} has rank sum_i C(c_i, i) (combinatorial number system).
    """
    if selected_TK.shape[1] == 1:
        return selected_TK.squeeze(1)
    binomials = _binomials(num_experts, selected_TK.shape[1], selected_TK.device)
    ascending_TK = selected_TK.sort(dim=1).values
    ranks = [column_N[expert_T] for column_N, expert_T in zip(binomials, ascending_TK.unbind(1), strict=True)]
    return torch.stack(ranks).sum(0)


def distinct_selections(selected_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the distinct selections of the tokens. The host waits until the device has counted the sets.

    Returns:
        sets_UK, one row of expert indices per set, and set_of_token_T, the row of each token's set.
    """
    keys_TW = selection_keys(selected_TK, num_experts)
    if keys_TW.shape[1] == 1:
        unique_U, set_of_token_T = torch.unique(keys_TW.squeeze(1), return_inverse=True)
    else:
        unique_U, set_of_token_T = torch.unique(keys_TW, dim=0, return_inverse=True)
    member_U = torch.empty(unique_U.shape[0], dtype=torch.long, device=selected_TK.device)
    member_U[set_of_token_T] = torch.arange(selected_TK.shape[0], device=selected_TK.device)
    return selected_TK[member_U], set_of_token_T


def selection_keys(selected_TK: Tensor, num_experts: int) -> Tensor:
    """Return the selections as bit sets [T, W] of int64 words."""
    words = -(-num_experts // _BITS_PER_WORD)
    bits_TK = torch.ones_like(selected_TK) << (selected_TK % _BITS_PER_WORD)
    word_TK = selected_TK // _BITS_PER_WORD
    return torch.stack([(bits_TK * (word_TK == word)).sum(1) for word in range(words)], dim=1)


def _binomials(num_experts: int, set_size: int, device: torch.device) -> list[Tensor]:
    """Return one tensor [N] of C(n, k), n < N, for each k from 1 to K, computed on the device by Pascal's rule.

    Values above C(N, K) are clamped to prevent overflow. No rank exceeds C(N, K), so larger values are not needed.
    """
    most = math.comb(num_experts, set_size)
    column_N = torch.ones(num_experts, dtype=torch.long, device=device)
    columns = []
    for _ in range(set_size):
        column_N = (column_N.cumsum(0) - column_N).clamp_max(most)
        columns.append(column_N)
    return columns
