"""Signals that ask a run to save and end."""

import signal
from types import FrameType

from hypermoe_ds.process import STOP_SIGNALS


class StopSignals:
    """From now on notes the signals that ask for an end, for the loop to read between two steps.

    One that is ignored already stays ignored: `nohup` and a script's `&` have it so, for what the terminal sends.

    Attributes:
        seen: whether one has come to this rank.
    """

    def __init__(self) -> None:
        self.seen = False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.seen = True
