"""Tokens per second, time left and peak memory."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Throughput:
    """Clock of the training steps alone: validation and saving are left out."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._tokens = 0
        self._steps = 0

    def count(self, tokens: int) -> None:
        """Count one optimizer step over `tokens` tokens of all ranks."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self) -> tuple[float, float]:
        """Tokens per second over all ranks and seconds per step since the last reading; starts anew."""
        now = time.perf_counter()
        seconds = now - self._started
        rates = self._tokens / seconds, seconds / max(self._steps, 1)
        self._started, self._tokens, self._steps = now, 0, 0
        return rates


def peak_memory_gib() -> float:
    """Most memory this rank has held, in GiB: of the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
