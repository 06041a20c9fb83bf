"""Losses that stand out from those before them."""

import math
import statistics
from collections import deque

_WINDOW = 128
_FEWEST = 16
_DEVIATIONS = 8.0
_NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


class SpikeDetector:
    """Compares each loss with the median of the last 128 in robust deviations: a spike does not hide the next one."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def deviations(self, loss: float) -> float | None:
        """How far a spike lies above the median, in robust standard deviations; None for any other loss.

        There is none among the first 16 losses of a start. A loss that is not finite is left to whoever skips steps.
        """
        if not math.isfinite(loss):
            return None
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < _FEWEST:
            return None
        median = statistics.median(before)
        spread = _NORMAL * statistics.median(abs(other - median) for other in before)
        # A run whose losses hardly differ is no reason to report a thousandth of a nat.
        deviations = (loss - median) / max(spread, 1e-3 * abs(median), 1e-12)
        return deviations if deviations > _DEVIATIONS else None
