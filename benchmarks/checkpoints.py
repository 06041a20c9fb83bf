"""Measure the time that training waits for a checkpoint, the time of the next step, and the time of a resume.

Saves in the background alternate with saves during which training waits. Resumes are measured with each value of
`checkpoint.verify`.

    deepspeed --num_gpus 2 benchmarks/checkpoints.py [--preset P] [--folder DIR] [key=value ...]

A key=value argument overrides a field of the preset's model, such as num_hidden_layers=2.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch

from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.checkpoint.manifest import Verify
from hypermoe_ds.checkpoint.settings import CheckpointConfig
from hypermoe_ds.config import apply_overrides
from hypermoe_ds.modeling import PRESETS, HyperMoEConfig
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.training.ds_config import merge
from hypermoe_ds.training.engine import build_engine, start_ranks
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig
from results import check_arguments, machine_line

_TOKENS = 256


@dataclass(frozen=True)
class Save:
    """Seconds that training waited for a save, and seconds of the step after the save."""

    waited: float
    step_after: float


@dataclass(frozen=True)
class Results:
    """Results of the benchmark.

    Attributes:
        saves: measurements of each kind of save.
        step: median seconds of a step without a save.
        resumes: seconds of each resume, by `checkpoint.verify`.
        bytes: size of one checkpoint.
    """

    saves: dict[str, list[Save]]
    step: float
    resumes: dict[str, list[float]]
    bytes: int


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-small-8e", choices=list(PRESETS), help="default: gpt2-small-8e")
    parser.add_argument(
        "--folder", type=Path, help="folder for the checkpoints, removed at the end (default: a temporary folder)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="saves of each kind (default: 5)")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    check_arguments(arguments, {"repeats": 1})

    rank, ranks = start_ranks()
    engine = build(HyperMoEConfig(**apply_overrides(dict(PRESETS[arguments.preset]), arguments.overrides)), ranks)
    name = [tempfile.mkdtemp(dir=arguments.folder)] if rank == 0 else [None]
    torch.distributed.broadcast_object_list(name)
    folder = Path(str(name[0]))
    try:
        results = measure(engine, folder, arguments.repeats)
    finally:
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(folder)
    if rank == 0:
        print("| written | training waited, s | the step after it, s |\n| --- | ---: | ---: |")
        for kind, saves in results.saves.items():
            waited, after = median(save.waited for save in saves), median(save.step_after for save in saves)
            print(f"| {kind} | {waited:.3f} | {after:.3f} |")
        resumes = ", ".join(f"verify={verify} {median(times):.3f} s" for verify, times in results.resumes.items())
        print(f"\na step without a save {results.step:.3f} s, a resume with {resumes}", end=" | ")
        model = " ".join([arguments.preset, *arguments.overrides])
        print(f"{results.bytes / 2**30:.2f} GiB, ranks {ranks}, {model}", end=" | ")
        print(machine_line(str(engine.device)))


def build(model_config: HyperMoEConfig, ranks: int) -> Any:
    """Build an fp32 engine and run one step, so that the optimizer state exists."""
    train = TrainConfig(steps=1000, micro_batch_size=1, global_batch_size=ranks, precision="fp32")
    ds_config = merge({"zero_optimization": {"stage": 1}}, train, model_config, 1, ranks)
    engine = build_engine(model_config, ds_config, OptimizerConfig(lr=1e-4), ScheduleConfig(), train, ParallelConfig())
    step(engine)
    return engine


def step(engine: Any) -> float:
    """Run one training step on random tokens and return its time in seconds."""
    began = time.perf_counter()
    ids = torch.randint(engine.module.config.vocab_size, (1, _TOKENS + 1), device=engine.device)
    engine.backward(
        engine(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), use_cache=False, output_logits=False).loss
    )
    engine.step()
    float(engine.get_global_grad_norm())  # reading the norm waits for the device
    return time.perf_counter() - began


def measure(engine: Any, folder: Path, repeats: int) -> Results:
    """Measure saves and resumes. The kinds of saves alternate, and so do the values of `checkpoint.verify`."""
    checkpoints = folder / "checkpoints"
    managers = {
        kind: CheckpointManager(engine, checkpoints, CheckpointConfig(asynchronous=asynchronous, keep_last=1), {})
        for kind, asynchronous in (("in the background", True), ("while training waits", False))
    }
    saves: dict[str, list[Save]] = {kind: [] for kind in managers}
    steps = []
    for number in range(1, repeats + 1):
        for kind, manager in managers.items():
            steps.append(step(engine))
            began = time.perf_counter()
            manager.save(number, {})
            waited = time.perf_counter() - began
            saves[kind].append(Save(waited, step(engine)))
            manager.finish()
    size = sum(path.stat().st_size for path in checkpoints.rglob("*.safetensors"))
    readers = {
        verify: CheckpointManager(engine, checkpoints, CheckpointConfig(verify=verify), {})
        for verify in get_args(Verify)
    }
    resumes: dict[str, list[float]] = {verify: [] for verify in readers}
    for _ in range(repeats):
        for verify, reader in readers.items():
            began = time.perf_counter()
            reader.resume()
            resumes[verify].append(time.perf_counter() - began)
    return Results(saves, median(steps), resumes, size)


if __name__ == "__main__":
    with one_line_errors():
        main()
