"""Interleave datasets in proportion to their weights, without storing the order."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_BLOCK = 1 << 12


class Blend:
    """An endless sequence of samples from several datasets; every range of the sequence follows the weights.

    With weights w that sum to 1, sample j of dataset d is assigned the time (j + 1/2) / w_d, and the samples are sorted
    by time. This is the order in which the Webster/Sainte-Lague method of apportionment assigns seats. Of the first n
    samples, w_d * n +- (1 + w_d * number of datasets) / 2 belong to dataset d. Any part of the sequence is computed
    from the weights alone, in blocks of 4,096 samples.

    Args:
        weights: relative weight of each dataset.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = np.array(weights, dtype=np.float64) / sum(weights)
        self._block = -1

    def locate(self, index: int) -> tuple[int, int]:
        """Return the dataset of the sample at `index`, and the number of earlier samples from this dataset."""
        block, offset = divmod(index, _BLOCK)
        self._load(block)
        return int(self._datasets[offset]), int(self._numbers[offset])

    def counts(self, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return, for each dataset, the number of its samples before index `end`."""
        block, offset = divmod(end, _BLOCK)
        self._load(block)
        return self._before + np.bincount(self._datasets[:offset], minlength=len(self._weights))

    def _load(self, block: int) -> None:
        if block == self._block:
            return
        first = block * _BLOCK
        # The time of a sample differs from its index by at most half the number of datasets.
        margin = len(self._weights)
        begin = self._samples_until(first - margin)
        sizes = self._samples_until(first + _BLOCK + margin) - begin
        datasets = np.repeat(np.arange(margin), sizes)
        numbers = np.concatenate([np.arange(size) for size in sizes]) + begin[datasets]
        order = np.argsort((numbers + 0.5) / self._weights[datasets], kind="stable")
        earlier, within = np.split(order, [first - begin.sum()])
        self._before = begin + np.bincount(datasets[earlier], minlength=margin)
        self._datasets, self._numbers = datasets[within[:_BLOCK]], numbers[within[:_BLOCK]]
        self._block = block

    def _samples_until(self, time: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return, for each dataset, the number of its samples before a time."""
        samples: np.ndarray[Any, np.dtype[np.int64]] = np.ceil(self._weights * time - 0.5).clip(min=0).astype(np.int64)
        return samples
