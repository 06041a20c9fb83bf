"""Samples that a run skips, given as indices in the order of the training samples."""

from collections.abc import Iterable, Iterator, Sequence


class SkippedSamples:
    """Sample indices to skip; the remaining samples keep their order.

    Args:
        ranges: first and last index of each range, both inclusive; ranges may overlap.

    Attributes:
        total: number of skipped indices.
    """

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        for first, last in sorted((first, last) for first, last in ranges):
            if self._ranges and first <= self._ranges[-1][1] + 1:
                self._ranges[-1] = (self._ranges[-1][0], max(last, self._ranges[-1][1]))
            else:
                self._ranges.append((first, last))
        self.total = sum(last - first + 1 for first, last in self._ranges)

    def nth(self, start: int, number: int) -> int:
        """Return the index of the `number`-th kept sample, counted from 0, at or after `start`."""
        index = start + number
        for first, last in self._ranges:
            begin = max(first, start)
            if begin > index:
                break
            index += max(0, last + 1 - begin)
        return index

    def after(self, start: int, count: int) -> int:
        """Return the index after the first `count` kept samples at or after `start`; `count` is at least 1."""
        return self.nth(start, count - 1) + 1

    def kept_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of kept samples from `start` to `end` (exclusive)."""
        for first, last in self._ranges:
            if start < min(first, end):
                yield start, min(first, end)
            start = max(start, last + 1)
        if start < end:
            yield start, end

    def kept(self, start: int, end: int) -> int:
        """Return the number of kept samples from `start` to `end` (exclusive)."""
        skipped = (min(last + 1, end) - max(first, start) for first, last in self._ranges)
        return end - start - sum(max(0, length) for length in skipped)
