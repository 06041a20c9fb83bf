"""Cache generated HyperExperts between the forward passes of one `generate` call.

The generated HyperExperts change if the parameters, adapters, hooks or modules of the hypernetwork change. Such changes
are expensive to detect, so the cache is discarded at the end of each `generate` call.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .generated import HyperExpertWeights


class HyperExpertCache:
    """Generated HyperExperts of one layer, keyed by selection.

    Args:
        capacity: maximum number of selections. If new selections do not fit, the cache is cleared first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._row_of_set: dict[tuple[int, ...], int] = {}
        self._weights: HyperExpertWeights | None = None

    def fetch(self, sets_UK: Tensor, generate: Callable[[Tensor], HyperExpertWeights]) -> HyperExpertWeights:
        """Return the HyperExperts of U <= `capacity` distinct selections. Generate the HyperExperts that are not
        cached.

        Args:
            sets_UK: expert indices of each selection.
            generate: function that maps sets_UK to weights.
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
    """Cached HyperExperts of all layers, used only by forward passes that receive this cache as an argument.

    Attributes:
        all_selections: each layer's weights for all possible selections, if these are few enough to cache. If None,
            each layer caches only the selections that its tokens use.
    """

    def __init__(self) -> None:
        self.all_selections: list[HyperExpertWeights] | None = None
        self._layers: dict[int, HyperExpertCache] = {}

    def layer(self, index: int, capacity: int) -> HyperExpertCache:
        """Return the cache of MoE layer `index`. Create the cache on first use."""
        if index not in self._layers:
            self._layers[index] = HyperExpertCache(capacity)
        return self._layers[index]
