"""Print what a run does, for the person who watches it."""

import os
import sys
from collections.abc import Mapping
from datetime import timedelta

from torch import Tensor


class Console:
    """Print lines on rank 0.

    Args:
        rank: this rank.
    """

    def __init__(self, rank: int) -> None:
        self._prints = rank == 0

    def log(self, line: str) -> None:
        """Print one line; ignore a closed stdout, as after a killed launcher."""
        if not self._prints:
            return
        try:
            print(line, flush=True)
        except OSError:  # the run continues, or saves and ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def step_line(step: int, steps: int, scalars: Mapping[str, float], seconds_left: float, load_MN: Tensor) -> str:
    """The console's line of one logged step."""
    parts = [
        f"step {step}/{steps}",
        f"loss {scalars['loss']:.4f}",
        f"lr {scalars['lr']:.2e}",
        f"grad norm {scalars['grad_norm']:.3f}",
        f"{scalars['tokens_per_second']:,.0f} tokens/s",
        f"{timedelta(seconds=round(seconds_left))} left",
    ]
    if load_MN.numel():
        parts.append(f"expert load {float(load_MN.min()):.1%} to {float(load_MN.max()):.1%}")
    return " | ".join(parts)
