"""Run one rank of a side, that is, of a model that train_step.py compares.

The rank builds the model and executes commands from stdin. Commands and answers are JSON lines.

train_step.py starts this script with the environment variables of DeepSpeed's launcher. Answers are written to a
separate pipe, because libraries print to stdout.
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

from hypermoe_ds.device import uses_gpu
from hypermoe_ds.training.engine import start_ranks
from op_shares import shares
from results import device_name
from sides import Batch, Step, build, global_parameters
from step_settings import StepSettings


def main() -> None:
    """Build the model and answer commands until stdin is closed."""
    side, settings, answers = sys.argv[1], StepSettings.from_json(sys.argv[2]), os.fdopen(int(sys.argv[3]), "w")
    rank, _ = start_ranks()
    module, step = build(side, settings)
    _reset_peak()
    built = {"parameters": global_parameters(module, settings.expert_parallel), "device": device_name()}
    _answer(answers, built)
    batches = _batches(settings, rank)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            _answer(answers, _execute(command, step, batches, settings.sequence_length, rank))
        except torch.OutOfMemoryError:
            _answer(answers, {"out_of_memory": True})


def _execute(command: dict[str, Any], step: Step, batches: Iterator[Batch], length: int, rank: int) -> dict[str, Any]:
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
    """Return the milliseconds per step by category. Only rank 0 is profiled; all ranks run the same steps."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if uses_gpu() else [])
    with profile(activities=activities) if rank == 0 else nullcontext() as profiler:
        for batch in batches:
            step(batch)
        _synchronize()
    return {"milliseconds": shares(profiler.key_averages(), len(batches)) if profiler is not None else {}}


def _batches(settings: StepSettings, rank: int) -> Iterator[Batch]:
    """Yield batches of random token ids, which differ between ranks and are the same for every side."""
    generator = torch.Generator().manual_seed(settings.seed + rank)
    shape = (settings.largest_micro_batch_size, settings.sequence_length + 1)
    while True:
        ids_BS = torch.randint(settings.model["vocab_size"], shape, generator=generator)
        batch = {"input_ids": ids_BS[:, :-1], "labels": ids_BS[:, 1:]}
        yield batch
        while settings.repeat_batch:
            yield batch


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _synchronize() -> None:
    if uses_gpu():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    """Reset the peak memory, so that later peaks do not include building the model.

    Building has the same peak for every side, because each rank first builds the whole model.
    """
    if uses_gpu():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    """Return the peak memory since the last reset, in GiB: allocated memory on the GPU, or resident memory on CPU."""
    if uses_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    kib = int(lines[0].split()[1]) if lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20


if __name__ == "__main__":
    main()
