"""Exchange Python objects between ranks over gloo, independently of training collectives."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

from hypermoe_ds.errors import UserError

Value = TypeVar("Value")


class ControlGroup:
    """A gloo process group for exchanging Python objects between all ranks.

    The constructor and all methods are collective. Each thread needs its own group, so that messages do not mix.

    Attributes:
        group: the process group, for collectives on CPU tensors.
        rank: this rank.
        size: number of ranks.
    """

    def __init__(self) -> None:
        self.group = torch.distributed.new_group(backend="gloo")
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def gather(self, value: Value) -> list[Value]:
        """Gather one value from each rank and return the list on every rank."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, self.group)
        return values

    def run_on_rank0(self, action: Callable[[], Value]) -> Value:
        """Run `action` on rank 0 and return its result on every rank.

        Raises:
            UserError: `action` raised a `UserError`; all ranks raise this error.
        """
        return self._shared(action if self.rank == 0 else None)[0]

    def gather_or_raise(self, action: Callable[[], Value]) -> list[Value]:
        """Run `action` on every rank and return the results of all ranks.

        Raises:
            UserError: `action` raised a `UserError` on one or more ranks; all ranks raise the error of the lowest
                of these ranks.
        """
        return self._shared(action)

    def _shared(self, action: Callable[[], Value] | None) -> list[Value]:
        try:
            outcome: Any = None if action is None else action()
        except UserError as error:
            outcome = error
        outcomes = self.gather(outcome)
        for result in outcomes:
            if isinstance(result, UserError):
                raise result
        return outcomes
