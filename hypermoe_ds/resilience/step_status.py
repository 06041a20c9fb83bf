"""Synchronise the status of each step across ranks."""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from hypermoe_ds.errors import MachineError
from hypermoe_ds.parallel.control_group import ControlGroup


@dataclass(frozen=True)
class StepStatus:
    """Status of a step; identical on all ranks.

    Attributes:
        stop: whether any rank received a stop signal.
        unsaved: whether the last background save failed on any rank.
        skipped: whether the step was skipped.
        loss: mean loss of the step over ranks and micro-batches.
    """

    stop: bool
    unsaved: bool
    skipped: bool
    loss: float


class StepLosses:
    """Copy a rank's losses to the host without waiting for the device.

    The copies are queued on the device before the optimizer step. The step waits for the gradient norm, which DeepSpeed
    queues after the copies, so the copies are complete after the step.

    Attributes:
        last_step: micro-batch losses of the last completed step.
    """

    def __init__(self) -> None:
        self.last_step: list[float] = []
        self._parts: list[Tensor] = []

    def add(self, loss: Tensor) -> Tensor:
        """Record the loss of a micro-batch and return the loss to differentiate.

        If the loss is NaN or infinite, the gradients of the returned loss are NaN.

        DeepSpeed decides only from the gradient norm whether to skip a step, and an infinite loss can have finite
        gradients. A finite loss is returned unchanged.
        """
        self._parts.append(loss.detach().float().to("cpu", non_blocking=True))
        return loss * (1 + 0 * loss.detach())

    def end_step(self) -> list[float]:
        """Return the losses of the step's micro-batches and begin the next step."""
        self.last_step = [float(part) for part in self._parts]
        self._parts.clear()
        return self.last_step


def all_reduce_status(
    ranks: ControlGroup, stop_requested: bool, unsaved: bool, skipped: bool, losses: list[float]
) -> StepStatus:
    """Combine the status of a step over all ranks (collective), with one all-reduce of four numbers on the host.

    The all-reduce takes 0.1 ms on one machine; on GPUs it overlaps with the optimizer step.

    Raises:
        MachineError: some ranks skipped the step and others did not.
    """
    mean = sum(losses) / len(losses)
    sums_4 = torch.tensor([stop_requested, unsaved, skipped, mean], dtype=torch.float64)
    torch.distributed.all_reduce(sums_4, group=ranks.group)
    stopping, failing, skipping, loss = sums_4.tolist()
    if skipping not in (0, ranks.size):
        raise MachineError(f"only {skipping:.0f} of {ranks.size} ranks skipped a step because of a NaN or Inf")
    return StepStatus(stopping > 0, failing > 0, skipping > 0, loss / ranks.size)
