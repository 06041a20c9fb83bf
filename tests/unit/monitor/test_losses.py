"""Losses between two records."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hypermoe_ds.monitor.losses import LossMeter
from tests.helpers.synchronisations import Synchronisations


def output(loss: float, aux: float | None = 1.0) -> Any:
    parts = {"lm_loss": loss, "loss": loss + 1, "aux_loss": aux, "z_loss": None if aux is None else 2 * aux}
    return SimpleNamespace(**{name: None if part is None else torch.tensor(part) for name, part in parts.items()})


def test_the_loss_is_the_mean_of_all_micro_batches_since_the_last_reading() -> None:
    meter = LossMeter()
    for losses in ([3.0, 4.5, 1.25], [2.0]):
        for loss in losses:
            meter.add(output(loss, aux=loss / 2))
        mean = math.fsum(losses) / len(losses)
        assert meter.read() == {"loss": mean, "total_loss": mean + 1, "aux_loss": mean / 2, "z_loss": mean}


def test_a_loss_that_is_not_finite_leaves_the_mean_of_the_others() -> None:
    meter = LossMeter()
    for loss in (2.0, math.nan, math.inf, 4.0):
        meter.add(output(loss))
    assert meter.read()["loss"] == 3.0
    meter.add(output(math.nan))
    assert math.isnan(meter.read()["loss"])


def test_a_dense_model_has_no_routing_losses() -> None:
    meter = LossMeter()
    meter.add(output(2.0, aux=None))
    assert meter.read() == {"loss": 2.0, "total_loss": 3.0}


def test_adding_a_loss_does_not_wait_for_the_device() -> None:
    meter, outputs = LossMeter(), [output(2.0), output(3.0)]
    with Synchronisations() as waits:
        for each in outputs:
            meter.add(each)
        assert waits.seen == []
        meter.read()
    assert waits.seen


def test_nothing_to_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="no loss was added"):
        LossMeter().read()
