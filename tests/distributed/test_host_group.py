"""What ranks tell each other on the host: one value on all, and the failure of one is the failure of all."""

import os

import pytest
import torch

from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.control_group import ControlGroup
from tests.helpers.ranks import run_on_ranks

RANKS = 3


def tell(fails: int | None) -> tuple[list[int], object, object]:
    """Everybody's rank, rank 0's process, everybody's process; or the failure of a rank."""
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
def test_all_ranks_know_the_same(fails: int | None) -> None:
    first, *others = run_on_ranks(RANKS, tell, fails)
    assert others == [first] * (RANKS - 1)
    ranks, of_first, of_all = first
    assert ranks == list(range(RANKS))
    failure = f"rank {fails}: fails; correct it"
    assert of_first == failure if fails == 0 else isinstance(of_first, int)
    assert of_all == failure if fails is not None else len(set(of_all)) == RANKS
