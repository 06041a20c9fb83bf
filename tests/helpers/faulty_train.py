"""Run pretrain/train.py and inject the fault that HYPERMOE_FAULT=KIND:RANK:STEP:MARKER describes.

The script creates the file MARKER just before it injects the fault, and injects no fault if the file already exists.
Faults of kind `error` create no file, so they recur in every launch.
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


def insert_nan_in_gradient(engine: Any) -> None:
    """Set one element of this rank's gradient to NaN in the next backward pass."""
    parameter = dict(engine.module.named_parameters())[PARAMETER]

    def insert_nan(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        faulty = gradient.clone()
        faulty.view(-1)[0] = torch.nan
        return faulty

    handle = parameter.register_hook(insert_nan)


def flip_bit(engine: Any) -> None:
    """Flip one bit in this rank's copy of a parameter."""
    words = dict(engine.module.named_parameters())[PARAMETER].data.view(torch.int32).view(-1)
    words[7] ^= 1 << 11


def signal_self(number: signal.Signals) -> Callable[[Any], None]:
    return lambda _engine: os.kill(os.getpid(), number)


FAULTS_BEFORE_STEP: dict[str, Callable[[Any], Any]] = {
    "kill": signal_self(signal.SIGKILL),
    "stop": signal_self(signal.SIGSTOP),
    "term": signal_self(signal.SIGTERM),
    "term_launcher": lambda _engine: os.kill(os.getppid(), signal.SIGTERM),
    "nan": insert_nan_in_gradient,
    "error": lambda _engine: 1 / 0,
}
FAULTS_AFTER_STEP: dict[str, Callable[[Any], None]] = {"flip": flip_bit}


def main() -> None:
    """Patch the optimizer step to inject the fault, then train."""
    kind, rank, step, marker = os.environ["HYPERMOE_FAULT"].split(":")
    original = loop.optimizer_step

    def step_with_fault(engine: Any, *arguments: Any) -> int:
        due = engine.global_steps + 1 == int(step) and engine.global_rank == int(rank) and not Path(marker).exists()
        if due and kind != "error":
            Path(marker).touch()
        if due and kind in FAULTS_BEFORE_STEP:
            FAULTS_BEFORE_STEP[kind](engine)
        tokens = original(engine, *arguments)
        if due and kind in FAULTS_AFTER_STEP:
            FAULTS_AFTER_STEP[kind](engine)
        return tokens

    loop.optimizer_step = step_with_fault  # type: ignore[assignment]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
