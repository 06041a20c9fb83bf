"""What all ranks know after a step, however one of them learnt it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from hypermoe_ds.errors import MachineError


@dataclass(frozen=True)
class Agreed:
    """The same on every rank.

    Attributes:
        stop: whether any rank was asked to end.
        skipped: whether the step was skipped.
        loss: mean loss of the step over ranks and micro-batches.
    """

    stop: bool
    skipped: bool
    loss: float


class StepLosses:
    """A rank's losses of one step on their way to the host; the device is never waited for.

    Each copy is queued before the step whose micro-batch it is of, and DeepSpeed's step waits for the norm of the
    gradient, which comes later in the queue.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, loss: Tensor) -> Tensor:
        """Note the loss of a micro-batch; gives it back to train on, with NaN for every gradient if it is not finite.

        An infinite loss may have finite gradients: DeepSpeed, which skips steps by the norm of the gradient, would
        take such a step. To the bit the same where the loss is finite.
        """
        self._parts.append(loss.detach().float().to("cpu", non_blocking=True))
        return loss * (1 + 0 * loss.detach())

    def take(self) -> list[float]:
        """The losses of the micro-batches, after the step; starts anew."""
        losses = [float(part) for part in self._parts]
        self._parts.clear()
        return losses


class Agreement:
    """One all-reduce of three numbers a step, on the host and on a gloo group of its own (building it is collective).

    Takes 0.1 ms on one machine. On GPUs the queue of the device still holds the optimizer's step then.
    """

    def __init__(self) -> None:
        self._group = torch.distributed.new_group(backend="gloo")
        self._ranks = torch.distributed.get_world_size()

    def reach(self, asked_to_stop: bool, skipped: bool, losses: list[float]) -> Agreed:
        """Bring the ranks together after a step (collective).

        Raises:
            MachineError: some ranks skipped the step and some did not.
        """
        mean = sum(losses) / len(losses)
        sums_3 = torch.tensor([float(asked_to_stop), float(skipped), mean], dtype=torch.float64)
        torch.distributed.all_reduce(sums_3, group=self._group)
        stopping, skipping, loss = sums_3.tolist()
        if skipping not in (0, self._ranks):
            raise MachineError(f"{skipping:.0f} of {self._ranks} ranks skipped a step for a NaN or Inf, the others not")
        return Agreed(stopping > 0, skipping > 0, loss / self._ranks)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value on every rank (collective)."""
        values: list[Any] = [None] * self._ranks
        torch.distributed.all_gather_object(values, value, self._group)
        return values
