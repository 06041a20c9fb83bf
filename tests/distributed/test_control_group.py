"""The control group gives all ranks the same values, and an error on one rank is raised on all of them."""

import os

import pytest
import torch

from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.control_group import ControlGroup
from tests.helpers.ranks import run_on_ranks

RANKS = 3


def exchange(fails: int | None) -> tuple[list[int], object, object]:
    """Return all ranks, the process id of rank 0, and all process ids.

    If an error on rank `fails` prevents an exchange, return its message instead of the process ids.
    """
    group = ControlGroup()

    def action() -> int:
        if group.rank == fails:
            raise UserError(f"rank {fails}", "fails", "correct it")
        return os.getpid()

    outcomes: list[object] = []
    for exchange in (group.run_on_rank0, group.gather_or_raise):
        try:
            outcomes.append(exchange(action))
        except UserError as error:
            outcomes.append(str(error))
    assert group.size == torch.distributed.get_world_size()
    return group.gather(group.rank), *outcomes


@pytest.mark.parametrize("fails", [None, 0, 2])
def test_all_ranks_get_the_same_values_or_the_same_error(fails: int | None) -> None:
    first, *others = run_on_ranks(RANKS, exchange, fails)
    assert others == [first] * (RANKS - 1)
    ranks, of_first, of_all = first
    assert ranks == list(range(RANKS))
    failure = f"rank {fails}: fails; correct it"
    assert of_first == failure if fails == 0 else isinstance(of_first, int)
    assert of_all == failure if fails is not None else len(set(of_all)) == RANKS
