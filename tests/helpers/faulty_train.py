"""Run pretrain/train.py with an injected fault, given by HYPERMOE_FAULT=KIND:RANK:STEP:MARKER.

The fault creates the file MARKER and does not recur while that file exists. A fault of kind `error` creates no file, so
it recurs in every launch.
"""

import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hypermoe_ds.training import loop

TRAIN = Path(__file__).parents[2] / "pretrain/train.py"
PARAMETER = "model.hypernetwork.down_weight.weight"


def nan_in_a_gradient(engine: Any) -> None:
    """Put a NaN into one element of this rank's gradient in the next backward pass."""
    parameter = dict(engine.module.named_parameters())[PARAMETER]

    def insert_nan(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        faulty = gradient.clone()
        faulty.view(-1)[0] = torch.nan
        return faulty

    handle = parameter.register_hook(insert_nan)


def flipped_bit(engine: Any) -> None:
    """Flip one bit in this rank's copy of a parameter."""
    words = dict(engine.module.named_parameters())[PARAMETER].data.view(torch.int32).view(-1)
    words[7] ^= 1 << 11


def signal_self(number: signal.Signals) -> Callable[[Any], None]:
    return lambda _engine: os.kill(os.getpid(), number)


BEFORE: dict[str, Callable[[Any], Any]] = {
    "kill": signal_self(signal.SIGKILL),
    "stop": signal_self(signal.SIGSTOP),
    "term": signal_self(signal.SIGTERM),
    "term_launcher": lambda _engine: os.kill(os.getppid(), signal.SIGTERM),
    "nan": nan_in_a_gradient,
    "error": lambda _engine: 1 / 0,
}
AFTER: dict[str, Callable[[Any], None]] = {"flip": flipped_bit}


def main() -> None:
    """Inject the fault into the optimizer step, then train."""
    kind, rank, step, marker = os.environ["HYPERMOE_FAULT"].split(":")
    original = loop.optimizer_step

    def step_with_fault(engine: Any, *arguments: Any) -> int:
        due = engine.global_steps + 1 == int(step) and engine.global_rank == int(rank) and not Path(marker).exists()
        if due and kind != "error":
            Path(marker).touch()
        if due and kind in BEFORE:
            BEFORE[kind](engine)
        tokens = original(engine, *arguments)
        if due and kind in AFTER:
            AFTER[kind](engine)
        return tokens

    loop.optimizer_step = step_with_fault  # type: ignore[assignment]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
