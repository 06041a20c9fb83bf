import signal
from collections.abc import Iterator

import pytest

from hypermoe_ds.process import STOP_SIGNALS
from hypermoe_ds.resilience.stop_signals import StopSignals


@pytest.fixture(params=STOP_SIGNALS, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """Yield each stop signal, and restore all handlers afterwards."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield request.param
    for stop, handler in handlers.items():
        signal.signal(stop, handler)


def test_a_stop_signal_is_recorded_and_does_not_end_the_process(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    signals = StopSignals()
    signal.raise_signal(number)
    assert signals.seen


def test_a_signal_that_was_ignored_at_launch_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    signals = StopSignals()
    signal.raise_signal(number)
    assert not signals.seen
