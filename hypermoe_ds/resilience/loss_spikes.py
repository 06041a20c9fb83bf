"""Detect loss spikes."""

import math
import statistics
from collections import deque

_WINDOW = 128
_FEWEST = 16
_DEVIATIONS = 8.0
_NORMAL = 1.4826  # standard deviation of a normal distribution / its median absolute deviation


class SpikeDetector:
    """Compare each loss with the median of the last 128, in robust deviations: a spike does not hide the next one."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def deviations(self, loss: float) -> float | None:
        """Return how far a spike is above the median, in robust standard deviations; None if the loss is no spike.

        The first 16 losses of a launch are never spikes. Losses that are not finite are ignored here: the step monitor
        reports them.
        """
        if not math.isfinite(loss):
            return None
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < _FEWEST:
            return None
        median = statistics.median(before)
        spread = _NORMAL * statistics.median(abs(other - median) for other in before)
        # If the losses hardly differ, do not report a thousandth of a nat.
        deviations = (loss - median) / max(spread, 1e-3 * abs(median), 1e-12)
        return deviations if deviations > _DEVIATIONS else None
