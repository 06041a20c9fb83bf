"""Test sample skipping against a plain enumeration."""

import random
from itertools import count, islice

import pytest

from hypermoe_ds.data.loader import ResumableSampler
from hypermoe_ds.data.skipped_samples import SkippedSamples


@pytest.mark.parametrize("seed", range(20))
def test_the_remaining_samples_keep_their_order(seed: int) -> None:
    generator = random.Random(seed)
    ranges = []
    for _ in range(generator.randrange(5)):
        first = generator.randrange(40)
        ranges.append([first, first + generator.randrange(6)])
    skipped = {index for first, last in ranges for index in range(first, last + 1)}
    skipped_samples = SkippedSamples(ranges)
    assert skipped_samples.total == len(skipped)
    for start in range(50):
        kept = list(islice((index for index in count(start) if index not in skipped), 12))
        assert [skipped_samples.nth(start, number) for number in range(12)] == kept
        assert [skipped_samples.after(start, number + 1) for number in range(12)] == [index + 1 for index in kept]
        for end in range(start, 60):
            assert skipped_samples.kept(start, end) == sum(index not in skipped for index in range(start, end))


def test_each_remaining_sample_is_read_once_after_resuming_on_more_ranks() -> None:
    skipped_samples = SkippedSamples([[3, 5], [10, 10], [20, 29]])
    kept = [index for index in range(60) if skipped_samples.kept(index, index + 1)]

    def read_by_all_ranks(consumed: int, size: int, micro_batch: int, steps: int) -> list[int]:
        ranks = [ResumableSampler(60, micro_batch, rank, size, consumed, skipped_samples) for rank in range(size)]
        return [index for step in islice(zip(*ranks, strict=True), steps) for block in step for index in block]

    assert read_by_all_ranks(0, 2, 2, 99) == kept[: len(kept) // 4 * 4]
    index = skipped_samples.after(0, 8)
    assert read_by_all_ranks(0, 2, 2, 2) + read_by_all_ranks(index, 4, 1, 99) == kept[: len(kept) // 4 * 4]


def test_skip_ranges_before_the_resume_point_have_no_effect() -> None:
    assert list(ResumableSampler(12, 2, 0, 1, 6, SkippedSamples([[1, 2], [8, 9]]))) == [[6, 7], [10, 11]]
