"""How long training stands still for a checkpoint, written in the background or while it waits, in turn; what a step
costs meanwhile; how long a resume takes with each `checkpoint.verify`, in turn too.

    deepspeed --num_gpus 2 benchmarks/checkpoints.py [--preset P] [--folder DIR] [key=value ...]

A key=value changes a field of the preset's model, such as num_hidden_layers=2.
"""

import argparse
import shutil
import tempfile
import time
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
from results import check_arguments, machine

_TOKENS = 256


def main() -> None:
    """Arguments and wiring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-small-8e", choices=list(PRESETS), help="default: gpt2-small-8e")
    parser.add_argument("--folder", type=Path, help="where to write; removed again (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="saves of each kind (default: 5)")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    check_arguments(given, {"repeats": 1})

    rank, ranks = start_ranks()
    engine = build(HyperMoEConfig(**apply_overrides(dict(PRESETS[given.preset]), given.overrides)), ranks)
    place = [tempfile.mkdtemp(dir=given.folder)] if rank == 0 else [None]
    torch.distributed.broadcast_object_list(place)
    folder = Path(str(place[0]))
    try:
        found = measure(engine, folder, given.repeats)
    finally:
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(folder)
    if rank == 0:
        print("| written | training waited, s | the step after it, s |\n| --- | ---: | ---: |")
        for name, times in found["saves"].items():
            print(f"| {name} | " + " | ".join(f"{median(column):.3f}" for column in zip(*times, strict=True)) + " |")
        resumes = ", ".join(f"verify={verify} {median(times):.3f} s" for verify, times in found["resumes"].items())
        print(f"\na step without a save {found['step']:.3f} s, a resume with {resumes}", end=" | ")
        print(f"{found['bytes'] / 2**30:.2f} GiB, ranks {ranks}, {given.preset} {' '.join(given.overrides)}", end=" | ")
        print(" | ".join(f"{key} {value}" for key, value in machine(str(engine.device)).items()))


def build(config: HyperMoEConfig, ranks: int) -> Any:
    """An engine in fp32 whose optimizer has taken a step."""
    train = TrainConfig(steps=1000, micro_batch_size=1, global_batch_size=ranks, precision="fp32")
    ds_config = merge({"zero_optimization": {"stage": 1}}, train, config, 1, ranks)
    engine = build_engine(config, ds_config, OptimizerConfig(lr=1e-4), ScheduleConfig(), train, ParallelConfig())
    step(engine)
    return engine


def step(engine: Any) -> float:
    """Seconds of one step on random tokens."""
    began = time.perf_counter()
    ids = torch.randint(engine.module.config.vocab_size, (1, _TOKENS + 1), device=engine.device)
    engine.backward(
        engine(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), use_cache=False, output_logits=False).loss
    )
    engine.step()
    float(engine.get_global_grad_norm())  # waits for the device
    return time.perf_counter() - began


def measure(engine: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of saves in turn, of steps with and without one, of resumes in turn; bytes of a checkpoint."""
    managers = {
        name: CheckpointManager(engine, folder / "checkpoints", CheckpointConfig(asynchronous=beside, keep_last=1), {})
        for name, beside in (("in the background", True), ("while it waits", False))
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in managers}
    alone = []
    for number in range(1, repeats + 1):
        for name, manager in managers.items():
            alone.append(step(engine))
            began = time.perf_counter()
            manager.save(number, {})
            waited = time.perf_counter() - began
            times[name].append((waited, step(engine)))
            manager.finish()
    size = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*.safetensors"))
    readers = {
        verify: CheckpointManager(engine, folder / "checkpoints", CheckpointConfig(verify=verify), {})
        for verify in get_args(Verify)
    }
    resumes: dict[str, list[float]] = {verify: [] for verify in readers}
    for _ in range(repeats):
        for verify, reader in readers.items():
            began = time.perf_counter()
            reader.resume()
            resumes[verify].append(time.perf_counter() - began)
    return {"saves": times, "step": median(alone), "resumes": resumes, "bytes": size}


if __name__ == "__main__":
    with one_line_errors():
        main()
