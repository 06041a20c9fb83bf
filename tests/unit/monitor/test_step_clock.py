"""Test the clock of the training steps with a fake time."""

import time

import pytest

from hypermoe_ds.monitor.memory import MemoryMeter
from hypermoe_ds.monitor.step_clock import StepClock


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", fake)
    return fake


def test_parts_are_means_over_steps_and_add_up_to_the_step_time(clock: Clock) -> None:
    steps = StepClock()
    for data_seconds in (1, 3):
        for part, seconds in (("data", data_seconds), ("forward", 2), ("backward", 4), ("optimizer", 0.5)):
            with steps.measure(part):  # type: ignore[arg-type]
                clock.now += seconds
        clock.now += 0.25
        steps.count(1000)
    with steps.measure("checkpoint"):
        clock.now += 6
    values = steps.read()
    assert values == {
        "tokens_per_second": 2000 / 17.5,  # excludes the time of the checkpoint
        "step_seconds": 11.75,
        "step_seconds/data": 2, "step_seconds/forward": 2, "step_seconds/backward": 4, "step_seconds/optimizer": 0.5,
        "step_seconds/checkpoint": 3, "step_seconds/other": 0.25,
    }  # fmt: skip
    parts = [value for key, value in values.items() if "/" in key]
    assert sum(parts) == values["step_seconds"]


def test_read_resets_the_clock(clock: Clock) -> None:
    steps = StepClock()
    for seconds, tokens, rate in ((2, 1000, 500), (10, 50, 5)):
        clock.now += seconds
        steps.count(tokens)
        values = steps.read()
        assert (values["tokens_per_second"], values["step_seconds"]) == (rate, seconds)


def test_validation_time_is_excluded(clock: Clock) -> None:
    steps = StepClock()
    clock.now += 2
    steps.count(100)
    with steps.excluded():
        clock.now += 50
    assert steps.read()["step_seconds"] == 2
    with steps.excluded():
        clock.now += 50
    clock.now += 4
    steps.count(100)
    assert steps.read()["tokens_per_second"] == 25


def test_peak_memory_never_falls() -> None:
    meter = MemoryMeter()
    before = meter.read()["peak_memory_gib"]
    held = bytearray(200 << 20)
    during = meter.read()["peak_memory_gib"]
    del held
    assert 0 < before <= during <= meter.read()["peak_memory_gib"]
    assert during >= 200 / 1024
