import math

import pytest
import torch

from hypermoe_ds.resilience.step_status import StepLosses
from tests.helpers.synchronisations import Synchronisations


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0, 1e-30, 2e38])
def test_a_finite_loss_and_its_gradient_are_bitwise_unchanged(value: float) -> None:
    weight = torch.tensor([value, 0.3], requires_grad=True)
    loss = weight[0] * weight[1].exp()
    [expected] = torch.autograd.grad(loss, weight, retain_graph=True)
    recorded = StepLosses().add(loss)
    [gradient] = torch.autograd.grad(recorded, weight)
    assert torch.equal(recorded, loss)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_non_finite_loss_makes_all_its_gradients_nan(value: float) -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = (weight * weight).sum() + value
    [plain] = torch.autograd.grad(loss, weight, retain_graph=True)
    assert plain.tolist() == [2, 4], "without StepLosses, the gradients are finite"
    [recorded] = torch.autograd.grad(StepLosses().add(loss), weight)
    assert recorded.isnan().all()


def test_recording_a_loss_does_not_synchronise_with_the_device() -> None:
    losses = StepLosses()
    parts = [torch.tensor(1.0), torch.tensor(2.0)]
    with Synchronisations() as waits:
        for part in parts:
            losses.add(part)
    assert waits.seen == []
    assert losses.end_step() == [1, 2]
    losses.add(parts[0])
    assert losses.end_step() == [1]
