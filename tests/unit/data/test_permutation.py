"""Test that permutations are complete, repeatable and statistically random."""

import numpy as np
import pytest

from hypermoe_ds.data.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 40), 97, 1000, 1024, 1025, 4999])
def test_every_number_occurs_once(size: int) -> None:
    permutation = Permutation(size, "key")
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_the_key_selects_the_order() -> None:
    first, again, other = (list(map(Permutation(500, key), range(500))) for key in ("a", "a", "b"))
    assert first == again
    assert np.mean(np.array(first) == other) < 0.02  # on average, two random orders of 500 numbers agree in 1 position


def test_an_order_of_a_trillion_numbers_is_evaluated_anywhere() -> None:
    permutation = Permutation(10**12, "key")
    found = [permutation(number) for number in (0, 1, 10**12 - 1)]
    assert len(set(found)) == 3
    assert all(0 <= number < 10**12 for number in found)


@pytest.mark.parametrize("size", [5, 16, 60])
def test_each_number_takes_each_position_equally_often(size: int) -> None:
    """Compare with a uniform distribution: the chi-squared statistic stays within five standard deviations."""
    keys = 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        permutation = Permutation(size, f"{key}")
        counts[np.arange(size), [permutation(number) for number in range(size)]] += 1
    expected = keys / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_neighbours_are_not_correlated() -> None:
    size = 20_000
    order = np.array(list(map(Permutation(size, "key"), range(size))))
    for lag in (1, 2, 141, 142):  # the permutation's table has 142 columns
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / size**0.5
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / size**0.5
