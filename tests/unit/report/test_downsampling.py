"""Test the downsampling of curves and the averages over time bins."""

import numpy as np
import pytest

from hypermoe_ds.report.downsampling import Bins, buckets, extremes, kept_positions

LENGTHS = [1, 2, 3, 5, 40, 41, 997, 10_000]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("points", [4, 40, 1000])
def test_buckets_cover_every_value_once_in_order(length: int, points: int) -> None:
    ranges = buckets(length, points)
    assert [index for first, end in ranges for index in range(first, end)] == list(range(length))
    assert len(kept_positions(length, points)) <= max(points, 4)
    assert length > points or len(ranges) == length


@pytest.mark.parametrize("length", LENGTHS)
def test_ends_and_extremes_of_a_curve_are_kept(length: int) -> None:
    values = np.random.default_rng(length).normal(size=length)
    for spike in (0, length // 2, length - 1):
        spiked = values.copy()
        spiked[spike] = 50
        kept, positions = extremes(spiked, 40), kept_positions(length, 40)
        assert len(kept) == len(positions)
        assert kept[0] == spiked[0]
        assert kept[-1] == spiked[-1]
        assert (kept.min(), kept.max()) == (spiked.min(), spiked.max())
        assert (np.diff(positions) > 0).all()
        assert positions[0] == 0
        assert positions[-1] == length - 1


def test_missing_values_do_not_hide_other_values() -> None:
    values = np.full(1000, np.nan)
    values[500] = 3
    kept = extremes(values, 40)
    assert np.nanmax(kept) == 3
    assert np.isnan(kept).sum() == len(kept) - 2


@pytest.mark.parametrize("records", [1, 7, 8, 9, 100, 1000])
def test_bins_contain_the_means_of_their_records(records: int) -> None:
    arrays = np.random.default_rng(0).random((records, 2, 3))
    bins = Bins(most=8)
    for step, array in enumerate(arrays):
        bins.add(10 * step, array)
    steps, means = bins.read()
    assert len(steps) == len(means) <= 16
    ends = [*(steps // 10)[1:], records]
    for mean, first, end in zip(means, steps // 10, ends, strict=True):
        np.testing.assert_allclose(mean, arrays[first:end].mean(0))
    assert steps[0] == 0
