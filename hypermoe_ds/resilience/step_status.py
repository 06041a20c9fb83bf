"""What all ranks know before the first step and after each, however one of them learnt it."""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from hypermoe_ds.errors import MachineError
from hypermoe_ds.parallel.control_group import ControlGroup


@dataclass(frozen=True)
class StepStatus:
    """The same on every rank.

    Attributes:
        stop: whether any rank was asked to end.
        unsaved: whether the last checkpoint could not be written beside the training.
        skipped: whether the step was skipped.
        loss: mean loss of the step over ranks and micro-batches.
    """

    stop: bool
    unsaved: bool
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


def all_reduce_status(
    ranks: ControlGroup, asked_to_stop: bool, unsaved: bool, skipped: bool, losses: list[float]
) -> StepStatus:
    """Bring the ranks together after a step (collective): one all-reduce of four numbers, on the host.

    Takes 0.1 ms on one machine. On GPUs the queue of the device still holds the optimizer's step then.

    Raises:
        MachineError: some ranks skipped the step and some did not.
    """
    mean = sum(losses) / len(losses)
    sums_4 = torch.tensor([asked_to_stop, unsaved, skipped, mean], dtype=torch.float64)
    torch.distributed.all_reduce(sums_4, group=ranks.group)
    stopping, failing, skipping, loss = sums_4.tolist()
    if skipping not in (0, ranks.size):
        raise MachineError(f"{skipping:.0f} of {ranks.size} ranks skipped a step for a NaN or Inf, the others not")
    return StepStatus(stopping > 0, failing > 0, skipping > 0, loss / ranks.size)
