"""Handle the signals that ask a run to save and stop."""

import signal
from types import FrameType

from hypermoe_ds.process import STOP_SIGNALS


class StopSignals:
    """Record stop signals, so that the training loop can stop between two steps.

    Signals that the process already ignores, for example because of `nohup` or `&` in a script, stay ignored.

    Attributes:
        seen: whether this rank has received a stop signal.
    """

    def __init__(self) -> None:
        self.seen = False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.seen = True
