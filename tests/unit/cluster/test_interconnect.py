"""The measurement between hosts: who exchanges with whom, and that what arrives is checked."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist

from hypermoe_ds.cluster import interconnect
from hypermoe_ds.cluster.interconnect import Interconnect, measure, rounds
from tests.helpers.ranks import run_on_ranks


@pytest.mark.parametrize("count", range(10))
def test_each_pair_of_hosts_meets_once_and_no_host_is_in_two_pairs_of_a_round(count: int) -> None:
    found = list(rounds(count))
    for pairs in found:
        hosts = [host for pair in pairs for host in pair]
        assert len(hosts) == len(set(hosts))
    met = sorted(pair for pairs in found for pair in pairs)
    assert met == sorted(itertools.combinations(range(count), 2))
    assert len(found) <= count


def measured(spoiled: bool) -> Interconnect:
    """Of two hosts of two ranks, as torchrun names them."""
    rank = dist.get_rank()
    os.environ.update(GROUP_RANK=str(rank // 2), LOCAL_RANK=str(rank % 2))
    if spoiled and rank == 3:
        usual = dist.all_reduce

        def flipping(tensor: torch.Tensor) -> None:
            usual(tensor)
            tensor[-1] += 1

        interconnect.dist.all_reduce = flipping
    return measure(1, torch.device("cpu"))


def test_two_hosts_of_two_ranks_are_measured_and_a_wrong_sum_is_found() -> None:
    found = run_on_ranks(4, measured, True)
    assert [link.wrong for link in found] == [["all-reduce"]] * 4
    first = found[0]
    assert first.all_reduce is not None
    assert first.all_to_all is not None
    assert min(first.all_reduce, first.all_to_all) > 0
    [(one, other, speed)] = first.pairs
    assert (one, other) == (0, 1)
    assert speed > 0


def alone() -> Interconnect:
    os.environ.update(GROUP_RANK="0", LOCAL_RANK="0")
    return measure(1, torch.device("cpu"))


def test_one_rank_alone_has_no_links() -> None:
    assert run_on_ranks(1, alone) == [Interconnect(None, None, [], [])]
