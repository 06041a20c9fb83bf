"""Skipped samples equal those of a plain enumeration."""

import random
from itertools import count, islice

import pytest

from hypermoe_ds.data.loader import ResumableSampler
from hypermoe_ds.data.skipped_samples import SkippedSamples


@pytest.mark.parametrize("seed", range(20))
def test_the_remaining_samples_keep_their_order(seed: int) -> None:
    drawn = random.Random(seed)
    ranges = []
    for _ in range(drawn.randrange(5)):
        first = drawn.randrange(40)
        ranges.append([first, first + drawn.randrange(6)])
    out = {place for first, last in ranges for place in range(first, last + 1)}
    skipped_samples = SkippedSamples(ranges)
    assert skipped_samples.total == len(out)
    for start in range(50):
        kept = list(islice((place for place in count(start) if place not in out), 12))
        assert [skipped_samples.nth(start, number) for number in range(12)] == kept
        assert [skipped_samples.after(start, number + 1) for number in range(12)] == [place + 1 for place in kept]
        for end in range(start, 60):
            assert skipped_samples.kept(start, end) == sum(place not in out for place in range(start, end))


def test_ranks_read_each_remaining_sample_once_after_any_resume() -> None:
    skipped_samples = SkippedSamples([[3, 5], [10, 10], [20, 29]])
    kept = [place for place in range(60) if skipped_samples.kept(place, place + 1)]

    def taken(consumed: int, size: int, micro_batch: int, steps: int) -> list[int]:
        ranks = [ResumableSampler(60, micro_batch, rank, size, consumed, skipped_samples) for rank in range(size)]
        return [place for step in islice(zip(*ranks, strict=True), steps) for block in step for place in block]

    assert taken(0, 2, 2, 99) == kept[: len(kept) // 4 * 4]
    place = skipped_samples.after(0, 8)
    assert taken(0, 2, 2, 2) + taken(place, 4, 1, 99) == kept[: len(kept) // 4 * 4]


def test_consumed_samples_may_be_skipped_later() -> None:
    assert list(ResumableSampler(12, 2, 0, 1, 6, SkippedSamples([[1, 2], [8, 9]]))) == [[6, 7], [10, 11]]
