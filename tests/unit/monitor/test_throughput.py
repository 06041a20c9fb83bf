"""The clock of the training steps, with time itself faked."""

import time

import pytest

from hypermoe_ds.monitor.throughput import Throughput, peak_memory_gib


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


def test_rates_are_since_the_last_reading(clock: Clock) -> None:
    throughput = Throughput()
    for seconds in (1, 3):
        clock.now += seconds
        throughput.count(1000)
    assert throughput.read() == (500, 2)
    clock.now += 10
    throughput.count(50)
    assert throughput.read() == (5, 10)


def test_validation_and_saving_are_left_out(clock: Clock) -> None:
    throughput = Throughput()
    clock.now += 2
    throughput.count(100)
    with throughput.paused():
        clock.now += 1000
    clock.now += 2
    throughput.count(100)
    with throughput.paused():
        clock.now += 1000
    assert throughput.read() == (50, 2)
    with throughput.paused():
        clock.now += 1000
    clock.now += 4
    throughput.count(100)
    assert throughput.read() == (25, 4)


def test_peak_memory_is_that_of_this_process() -> None:
    assert 0.05 < peak_memory_gib() < 1000
