"""Test that blends follow their weights, against the greedy form of the Webster/Sainte-Lague method."""

import numpy as np
import pytest

from hypermoe_ds.data import blend
from hypermoe_ds.data.blend import Blend

WEIGHTS = [[1.0], [1, 1], [6, 1.5, 2.5], [0.7, 0.2, 0.1], [1e9, 1, 1e-6], [1 / 3] * 100, list(range(1, 30))]


def greedy(weights: list[float], length: int) -> list[int]:
    """Give each place to the dataset with the largest w / (2 n + 1).

    The weight of the dataset is w, and n is the number of places that the dataset already has.
    """
    counts, found = np.zeros(len(weights)), []
    for _ in range(length):
        best = int(np.argmin((counts + 0.5) / (np.array(weights) / sum(weights))))
        counts[best] += 1
        found.append(best)
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_order_is_that_of_webster_and_sainte_lague(weights: list[float]) -> None:
    sequence = Blend(weights)
    assert [sequence.locate(index)[0] for index in range(1000)] == greedy(weights, 1000)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_samples_of_a_dataset_are_numbered_without_gaps(
    weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blend, "_BLOCK", 64)
    sequence = Blend(weights)
    counts = np.zeros(len(weights), dtype=int)
    for index in range(1000):
        assert sequence.counts(index).tolist() == counts.tolist()
        dataset, number = sequence.locate(index)
        assert number == counts[dataset]
        counts[dataset] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_beginning_follows_the_weights(weights: list[float]) -> None:
    sequence, shares = Blend(weights), np.array(weights) / sum(weights)
    for end in (0, 1, 7, 4095, 4096, 4097, 123_456, 10**9, 10**15):
        counts = sequence.counts(end)
        assert counts.sum() == end
        assert (np.abs(counts - shares * end) <= (1 + shares * len(weights)) / 2 + 1e-15 * end).all()


def test_the_order_does_not_depend_on_the_parts_that_were_read_before() -> None:
    weights = [3.0, 1.0, 0.5]
    straight = Blend(weights)
    expected = {index: straight.locate(index) for index in range(0, 20_000, 7)}
    jumping = Blend(weights)
    for index in np.random.default_rng(0).permutation(list(expected)).tolist():
        assert jumping.locate(index) == expected[index]
