"""Test the average of losses between two records."""

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


def test_loss_is_the_mean_over_micro_batches_since_the_last_read() -> None:
    meter = LossMeter()
    for losses in ([3.0, 4.5, 1.25], [2.0]):
        for loss in losses:
            meter.add(output(loss, aux=loss / 2))
        mean = math.fsum(losses) / len(losses)
        assert meter.read() == {"loss": mean, "total_loss": mean + 1, "aux_loss": mean / 2, "z_loss": mean}


def test_mean_loss_ignores_nan_and_infinity() -> None:
    meter = LossMeter()
    for loss in (2.0, math.nan, math.inf, 4.0):
        meter.add(output(loss))
    assert meter.read()["loss"] == 3.0
    meter.add(output(math.nan))
    assert math.isnan(meter.read()["loss"])


def test_dense_model_has_no_routing_losses() -> None:
    meter = LossMeter()
    meter.add(output(2.0, aux=None))
    assert meter.read() == {"loss": 2.0, "total_loss": 3.0}


def test_adding_a_loss_does_not_wait_for_the_device() -> None:
    meter, outputs = LossMeter(), [output(2.0), output(3.0)]
    with Synchronisations() as waits:
        for micro_batch in outputs:
            meter.add(micro_batch)
        assert waits.seen == []
        meter.read()
    assert waits.seen


def test_read_without_a_loss_raises() -> None:
    with pytest.raises(ValueError, match="no loss was added"):
        LossMeter().read()
