"""Tests of the bandwidth measurement between hosts: its pairs, and the check of received values."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist

from hypermoe_ds.cluster import interconnect
from hypermoe_ds.cluster.interconnect import Interconnect, measure, rounds
from tests.helpers.ranks import run_on_ranks


@pytest.mark.parametrize("count", range(10))
def test_each_pair_of_hosts_is_measured_once_and_no_host_twice_in_a_round(count: int) -> None:
    found = list(rounds(count))
    for pairs in found:
        hosts = [host for pair in pairs for host in pair]
        assert len(hosts) == len(set(hosts))
    met = sorted(pair for pairs in found for pair in pairs)
    assert met == sorted(itertools.combinations(range(count), 2))
    assert len(found) <= count


def measured(spoiled: bool) -> Interconnect:
    """Measure bandwidths with two emulated hosts of two ranks each. If `spoiled`, one rank receives a wrong sum."""
    rank = dist.get_rank()
    os.environ.update(GROUP_RANK=str(rank // 2), LOCAL_RANK=str(rank % 2))
    if spoiled and rank == 3:
        correct = dist.all_reduce

        def spoiled_all_reduce(tensor: torch.Tensor) -> None:
            correct(tensor)
            tensor[-1] += 1

        interconnect.dist.all_reduce = spoiled_all_reduce
    return measure(1, torch.device("cpu"))


def test_two_hosts_are_measured_and_a_wrong_sum_is_found() -> None:
    found = run_on_ranks(4, measured, True)
    assert [link.wrong for link in found] == [["all-reduce"]] * 4
    first = found[0]
    assert first.all_reduce is not None
    assert first.all_to_all is not None
    assert min(first.all_reduce, first.all_to_all) > 0
    [(one, other, speed)] = first.pairs
    assert (one, other) == (0, 1)
    assert speed > 0


def measure_alone() -> Interconnect:
    os.environ.update(GROUP_RANK="0", LOCAL_RANK="0")
    return measure(1, torch.device("cpu"))


def test_one_rank_has_nothing_to_measure() -> None:
    assert run_on_ranks(1, measure_alone) == [Interconnect(None, None, [], [])]
