"""One rank of one side: builds it, then does what is written to its stdin, a JSON object a line, and answers likewise.

Started by train_step.py with the environment that DeepSpeed's launcher gives. It answers on a pipe of its own, for what
libraries print goes to stdout.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.profiler import ProfilerActivity, profile

from hypermoe_ds.training.engine import start_ranks
from op_shares import shares
from results import device_name
from sides import Batch, Step, build, global_parameters


def main() -> None:
    """Build, then answer until stdin ends."""
    side, settings, answers = sys.argv[1], json.loads(sys.argv[2]), os.fdopen(int(sys.argv[3]), "w")
    rank, world_size = start_ranks()
    module, step = build(side, settings, world_size)
    _reset_peak()
    first = {"parameters": global_parameters(module, settings["expert_parallel"]), "device": device_name()}
    _answer(answers, first)
    batches = _batches(settings, rank)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            _answer(answers, _obey(command, step, batches, settings["sequence_length"], rank))
        except torch.OutOfMemoryError:
            _answer(answers, {"out_of_memory": True})


def _obey(command: dict[str, Any], step: Step, batches: Iterator[Batch], length: int, rank: int) -> dict[str, Any]:
    if command["do"] == "peak":
        return {"peak_memory_gib": _peak_gib()}
    steps, size = command["steps"], command["micro_batch_size"]
    chosen = [
        {name: ids_BS[:size, :length].contiguous() for name, ids_BS in next(batches).items()} for _ in range(steps)
    ]
    if command["do"] == "profile":
        return _profile(step, chosen, rank)
    _synchronize()
    started = time.perf_counter()
    losses = [step(batch) for batch in chosen]
    _synchronize()
    return {"seconds": (time.perf_counter() - started) / steps, "loss": float(losses[-1])}


def _profile(step: Step, batches: list[Batch], rank: int) -> dict[str, Any]:
    """Milliseconds of each category a step, on rank 0; the other ranks only keep it company."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) if rank == 0 else nullcontext() as profiler:
        for batch in batches:
            step(batch)
        _synchronize()
    return {"milliseconds": shares(profiler.key_averages(), len(batches)) if profiler is not None else {}}


def _batches(settings: dict[str, Any], rank: int) -> Iterator[Batch]:
    """Random token ids, other ones on each rank, the same for every side."""
    generator = torch.Generator().manual_seed(settings["seed"] + rank)
    shape = (settings["largest_micro_batch_size"], settings["sequence_length"] + 1)
    while True:
        ids_BS = torch.randint(settings["model"]["vocab_size"], shape, generator=generator)
        batch = {"input_ids": ids_BS[:, :-1], "labels": ids_BS[:, 1:]}
        yield batch
        while settings["repeat_batch"]:
            yield batch


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    """Forget the peak of building, which every side has alike: each rank builds the whole model first."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    """Most memory held since: allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    kib = int(lines[0].split()[1]) if lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20


if __name__ == "__main__":
    main()
