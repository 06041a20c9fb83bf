"""Detect loss spikes."""

import math
import statistics
from collections import deque

_WINDOW = 128
_FEWEST = 16
_DEVIATIONS = 8.0
_NORMAL = 1.4826  # standard deviation of a normal distribution / its median absolute deviation


class SpikeDetector:
    """Detect losses far above the median of the last 128 losses; the median is robust against earlier spikes."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def deviations(self, loss: float) -> float | None:
        """Return by how many robust standard deviations a spike exceeds the median; None if the loss is not a spike.

        The robust standard deviation is 1.4826 times the median absolute deviation. The first 16 losses of a launch are
        never spikes. NaN and infinite losses are ignored here, because the step monitor reports them.
        """
        if not math.isfinite(loss):
            return None
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < _FEWEST:
            return None
        median = statistics.median(before)
        spread = _NORMAL * statistics.median(abs(other - median) for other in before)
        # The spread has a lower bound. Without it, a tiny change of a nearly constant loss would count as a spike.
        deviations = (loss - median) / max(spread, 1e-3 * abs(median), 1e-12)
        return deviations if deviations > _DEVIATIONS else None
