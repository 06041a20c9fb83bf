"""Losses on their way to the host."""

import math

import pytest
import torch

from hypermoe_ds.resilience.step_status import StepLosses
from tests.helpers.synchronisations import Synchronisations


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0, 1e-30, 2e38])
def test_a_finite_loss_is_trained_on_to_the_bit(value: float) -> None:
    weight = torch.tensor([value, 0.3], requires_grad=True)
    loss = weight[0] * weight[1].exp()
    [expected] = torch.autograd.grad(loss, weight, retain_graph=True)
    watched = StepLosses().add(loss)
    [found] = torch.autograd.grad(watched, weight)
    assert torch.equal(watched, loss)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_leaves_no_gradient_finite(value: float) -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = (weight * weight).sum() + value
    [plain] = torch.autograd.grad(loss, weight, retain_graph=True)
    assert plain.tolist() == [2, 4], "which is why"
    [watched] = torch.autograd.grad(StepLosses().add(loss), weight)
    assert watched.isnan().all()


def test_the_host_does_not_wait_for_a_loss_before_the_step() -> None:
    losses = StepLosses()
    parts = [torch.tensor(1.0), torch.tensor(2.0)]
    with Synchronisations() as waits:
        for part in parts:
            losses.add(part)
    assert waits.seen == []
    assert losses.end_step() == [1, 2]
    losses.add(parts[0])
    assert losses.end_step() == [1]
