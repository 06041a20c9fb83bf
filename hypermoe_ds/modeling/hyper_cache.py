"""Keeps generated HyperExperts between the forward passes of one `generate` call.

What the hypernetwork computes depends on more than its parameters: on adapters switched on or off, hooks, swapped or
quantised modules. Nothing cheap detects all of these, so that nothing is kept where one of them can change.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .generated import HyperExpertWeights


class HyperExpertCache:
    """Generated HyperExperts of one layer by their set of experts.

    Args:
        capacity: most sets to keep; a set that finds no room clears the others out.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._row_of_set: dict[tuple[int, ...], int] = {}
        self._weights: HyperExpertWeights | None = None

    def fetch(self, sets_UK: Tensor, generate: Callable[[Tensor], HyperExpertWeights]) -> HyperExpertWeights:
        """The HyperExperts of U distinct sets, at most `capacity` of them; generates those that are missing.

        Args:
            sets_UK: expert indices.
            generate: sets_UK -> weights.
        """
        wanted = [tuple(sorted(experts)) for experts in sets_UK.tolist()]
        missing = [row for row, experts in enumerate(wanted) if experts not in self._row_of_set]
        if len(self._row_of_set) + len(missing) > self.capacity:
            self._row_of_set, self._weights = {}, None
            missing = list(range(len(wanted)))
        if missing:
            self._add([wanted[row] for row in missing], generate(sets_UK[missing]))
        assert self._weights is not None
        rows = [self._row_of_set[experts] for experts in wanted]
        if rows == list(range(len(self._row_of_set))):
            return self._weights
        return HyperExpertWeights(*(weight[rows] for weight in self._weights))

    def _add(self, sets: list[tuple[int, ...]], weights: HyperExpertWeights) -> None:
        for experts in sets:
            self._row_of_set[experts] = len(self._row_of_set)
        if self._weights is not None:
            weights = HyperExpertWeights(*map(torch.cat, zip(self._weights, weights, strict=True)))
        self._weights = weights


class KeptHyperExperts:
    """The HyperExperts of all layers. Only the forward passes that are given it use it.

    Attributes:
        all_sets: of each layer those of all sets there can be, where these are few enough to be kept; otherwise each
            layer has a cache of those that occur.
    """

    def __init__(self) -> None:
        self.all_sets: list[HyperExpertWeights] | None = None
        self._layers: dict[int, HyperExpertCache] = {}

    def layer(self, index: int, capacity: int) -> HyperExpertCache:
        """The cache of MoE layer `index`, made at its first use."""
        if index not in self._layers:
            self._layers[index] = HyperExpertCache(capacity)
        return self._layers[index]
