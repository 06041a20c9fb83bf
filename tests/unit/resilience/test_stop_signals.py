"""Which signals ask a run to save and end."""

import signal
from collections.abc import Iterator

import pytest

from hypermoe_ds.process import STOP_SIGNALS
from hypermoe_ds.resilience.stop_signals import StopSignals


@pytest.fixture(params=STOP_SIGNALS, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """One of them; what is done at it is put back at the end."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield request.param
    for stop, handler in before.items():
        signal.signal(stop, handler)


def test_each_is_noted_and_lets_the_step_end(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    signals = StopSignals()
    signal.raise_signal(number)
    assert signals.seen


def test_one_that_is_ignored_where_the_job_was_started_stays_so(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    signals = StopSignals()
    signal.raise_signal(number)
    assert not signals.seen
