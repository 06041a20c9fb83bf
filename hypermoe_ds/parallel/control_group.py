"""What ranks tell each other in host memory, beside the training."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

from hypermoe_ds.errors import UserError

Value = TypeVar("Value")


class ControlGroup:
    """Exchanges objects between all ranks, on a gloo group of its own.

    Building it and all its methods are collective. Each user has one of its own: messages of one thread never meet
    those of another.

    Attributes:
        group: the process group, for collectives on tensors of the host.
        rank: this rank.
        size: number of ranks.
    """

    def __init__(self) -> None:
        self.group = torch.distributed.new_group(backend="gloo")
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def gather(self, value: Value) -> list[Value]:
        """Everybody's value, on every rank."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, self.group)
        return values

    def run_on_rank0(self, action: Callable[[], Value]) -> Value:
        """What rank 0 finds or does, told to all.

        Raises:
            UserError: of rank 0, on every rank.
        """
        return self._shared(action if self.rank == 0 else None)[0]

    def gather_or_raise(self, action: Callable[[], Value]) -> list[Value]:
        """What each rank finds or does, told to all.

        Raises:
            UserError: of the first rank that has one, on every rank.
        """
        return self._shared(action)

    def _shared(self, action: Callable[[], Value] | None) -> list[Value]:
        try:
            outcome: Any = None if action is None else action()
        except UserError as error:
            outcome = error
        outcomes = self.gather(outcome)
        for told in outcomes:
            if isinstance(told, UserError):
                raise told
        return outcomes
