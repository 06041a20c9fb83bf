"""Keeps generated HyperExperts between forward passes that change no parameter."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .generated import HyperExpertWeights

Version = tuple[tuple[int, int], ...]


def version_of(parameters: Iterable[Tensor]) -> Version:
    """Changes when a parameter is written in place or replaced.

    A write through `.data` is not seen.
    """
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)


class HyperExpertCache:
    """Generated HyperExperts of one layer by their set of experts.

    Args:
        capacity: most sets to keep; a set that finds no room clears the others out.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._version: Version | None = None
        self._row_of_set: dict[tuple[int, ...], int] = {}
        self._weights: HyperExpertWeights | None = None

    def fetch_all(self, version: Version, generate: Callable[[], HyperExpertWeights]) -> HyperExpertWeights:
        """The HyperExperts of all sets there can be, in one go; nothing waits for the host."""
        if self._weights is None or version != self._version:
            self._weights, self._version = generate(), version
        return self._weights

    def fetch(
        self, sets_UK: Tensor, version: Version, generate: Callable[[Tensor], HyperExpertWeights]
    ) -> HyperExpertWeights:
        """The HyperExperts of U distinct sets, at most `capacity` of them; generates those that are missing.

        Args:
            sets_UK: expert indices.
            version: of the parameters that they are generated from.
            generate: sets_UK -> weights.
        """
        wanted = [tuple(sorted(experts)) for experts in sets_UK.tolist()]
        missing = [row for row, experts in enumerate(wanted) if experts not in self._row_of_set]
        if version != self._version or len(self._row_of_set) + len(missing) > self.capacity:
            self._row_of_set, self._weights, self._version = {}, None, version
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
