"""Measure how long each part of a training step takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from hypermoe_ds.device import uses_gpu
from hypermoe_ds.monitor.metrics import STEP_PARTS

Part = Literal["data", "forward", "backward", "optimizer", "checkpoint"]
_ON_DEVICE = ("forward", "backward", "optimizer")


class StepClock:
    """Time the parts of all steps since the last `read`; only `read` synchronises with the device.

    CUDA events time the parts that run on a GPU; the host's clock times the other parts.
    """

    def __init__(self) -> None:
        self._has_events = uses_gpu()
        self._start()

    def _start(self) -> None:
        self._seconds = dict.fromkeys(STEP_PARTS, 0.0)
        self._events: list[tuple[Part, Any, Any]] = []
        self._began = time.perf_counter()
        self._excluded = 0.0
        self._steps = self._tokens = 0

    def count(self, tokens: int) -> None:
        """Count one optimizer step, in which all ranks together process `tokens` tokens."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Add the time spent inside the context to a part of the step."""
        if self._has_events and part in _ON_DEVICE:
            begin, end = _event(), _event()
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - began

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the time spent inside the context, for example on validation."""
        began = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Return tokens per second over all ranks and seconds per step, in total and by part; then reset.

        The tokens per second exclude the time spent on checkpoints. On a GPU, this method waits for the last step.
        """
        if self._events:
            self._events[-1][2].synchronize()
        wall = time.perf_counter() - self._began - self._excluded
        for part, begin, end in self._events:
            self._seconds[part] += begin.elapsed_time(end) / 1000
        # The wait for data overlaps with work on the device, so the parts may add up to more than the wall time.
        self._seconds["other"] = max(wall - sum(self._seconds.values()), 0.0)
        steps = max(self._steps, 1)
        values = {
            "tokens_per_second": self._tokens / max(wall - self._seconds["checkpoint"], 1e-9),
            "step_seconds": wall / steps,
            **{f"step_seconds/{part}": seconds / steps for part, seconds in self._seconds.items()},
        }
        self._start()
        return values


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
