"""pretrain/train.py with one fault in it: HYPERMOE_FAULT=KIND:RANK:STEP:MARKER. It leaves MARKER and happens once.

A fault of the kind `error` happens every time.
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
    """In one element, on this rank, in the next backward pass."""
    parameter = dict(engine.module.named_parameters())[PARAMETER]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = torch.nan
        return spoilt

    handle = parameter.register_hook(spoil)


def flipped_bit(engine: Any) -> None:
    """In this rank's copy of a parameter."""
    words = dict(engine.module.named_parameters())[PARAMETER].data.view(torch.int32).view(-1)
    words[7] ^= 1 << 11


def to_self(number: signal.Signals) -> Callable[[Any], None]:
    return lambda _engine: os.kill(os.getpid(), number)


BEFORE: dict[str, Callable[[Any], Any]] = {
    "kill": to_self(signal.SIGKILL),
    "stop": to_self(signal.SIGSTOP),
    "term": to_self(signal.SIGTERM),
    "term_launcher": lambda _engine: os.kill(os.getppid(), signal.SIGTERM),
    "nan": nan_in_a_gradient,
    "error": lambda _engine: 1 / 0,
}
AFTER: dict[str, Callable[[Any], None]] = {"flip": flipped_bit}


def main() -> None:
    """Put the fault into the optimizer's step, then train."""
    kind, rank, step, marker = os.environ["HYPERMOE_FAULT"].split(":")
    genuine = loop.optimizer_step

    def step_with_fault(engine: Any, *arguments: Any) -> int:
        due = engine.global_steps + 1 == int(step) and engine.global_rank == int(rank) and not Path(marker).exists()
        if due and kind != "error":
            Path(marker).touch()
        if due and kind in BEFORE:
            BEFORE[kind](engine)
        tokens = genuine(engine, *arguments)
        if due and kind in AFTER:
            AFTER[kind](engine)
        return tokens

    loop.optimizer_step = step_with_fault  # type: ignore[assignment]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
