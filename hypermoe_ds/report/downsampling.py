"""Reduce the number of points in curves and the number of bins over time."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def buckets(length: int, points: int) -> list[tuple[int, int]]:
    """Split `length` values into half-open ranges, each of which becomes two points.

    The first value and the last value are separate ranges, so that a curve keeps its end points. If there are at most
    `points` values, each value is a range.
    """
    if length <= max(points, 4):
        return [(index, index + 1) for index in range(length)]
    inner = max((points - 2) // 2, 1)
    edges = np.linspace(1, length - 1, inner + 1).astype(int)
    ranges = [(int(first), int(end)) for first, end in pairwise(edges) if first < end]
    return [(0, 1), *ranges, (length - 1, length)]


def kept_positions(length: int, points: int) -> Ints:
    """Return the x positions of the points of `extremes`: those of the first and last value of each range."""
    pairs = [(first, end - 1) if end - first > 1 else (first,) for first, end in buckets(length, points)]
    return np.array([position for pair in pairs for position in pair], dtype=np.int64)


def extremes(values: Floats, points: int) -> Floats:
    """Return the smallest and largest value of each range in order of occurrence, so that no spike is lost.

    Args:
        values: values of a curve; NaN marks a missing value. A range without values stays NaN.
        points: approximate number of points to keep.
    """
    kept: list[float] = []
    for first, end in buckets(len(values), points):
        part = values[first:end]
        if end - first == 1:
            kept.append(float(part[0]))
        elif np.isnan(part).all():
            kept += [np.nan, np.nan]
        else:
            low, high = int(np.nanargmin(part)), int(np.nanargmax(part))
            kept += [float(part[index]) for index in sorted((low, high))]
    return np.array(kept)


class Bins:
    """Average arrays over bins with equal numbers of records when the total number of records is not known in advance.

    When the number of bins reaches twice the target, neighbouring bins are merged. Memory therefore does not grow with
    the run.

    Args:
        most: target number of bins; the result has fewer than twice that number.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._width = 1
        self._sums: list[Floats] = []
        self._counts: list[int] = []
        self._first_steps: list[int] = []

    def add(self, step: int, values: Floats) -> None:
        """Add the array of one record."""
        if not self._counts or self._counts[-1] == self._width:
            if len(self._counts) == 2 * self._most:
                self._merge()
            self._sums.append(np.zeros_like(values))
            self._counts.append(0)
            self._first_steps.append(step)
        self._sums[-1] = self._sums[-1] + values
        self._counts[-1] += 1

    def _merge(self) -> None:
        pairs = range(0, len(self._counts), 2)
        self._sums = [self._sums[i] + self._sums[i + 1] for i in pairs]
        self._counts = [self._counts[i] + self._counts[i + 1] for i in pairs]
        self._first_steps = [self._first_steps[i] for i in pairs]
        self._width *= 2

    def read(self) -> tuple[Ints, Floats]:
        """Return the first step of each bin and the means [bins, ...]."""
        if len(self._counts) > self._most and len(self._counts) % 2 == 0:
            self._merge()
        means = [total / count for total, count in zip(self._sums, self._counts, strict=True)]
        return np.array(self._first_steps, dtype=np.int64), np.array(means)
