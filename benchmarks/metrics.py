"""What the metrics of a run cost: steps without any, and steps as a run measures and logs them, in turn on one rank.

Three kinds of steps are measured: between two records, logged, and logged with norms. Of each it reports the seconds
spent in the metrics' own calls, waiting for the device before and after each, and the whole step over one without
metrics, which has the noise of whole steps. The kinds' shares in a run with the default intervals give the cost.
A key=value changes a field of the preset's model, such as num_hidden_layers=2.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hypermoe_ds.config import apply_overrides
from hypermoe_ds.modeling import PRESETS, HyperMoEConfig
from hypermoe_ds.monitor.console import Console
from hypermoe_ds.monitor.flops import ModelFlops, training_flops_per_token
from hypermoe_ds.monitor.logger import MetricLogger
from hypermoe_ds.monitor.settings import MonitorConfig
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.training.ds_config import load_deepspeed_json, merge
from hypermoe_ds.training.engine import build_engine, start_ranks
from hypermoe_ds.training.loop import StepObserver, optimizer_step
from hypermoe_ds.training.norms import ParameterNorms
from hypermoe_ds.training.profiling import Profiler
from hypermoe_ds.training.recorder import Recorder
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig
from hypermoe_ds.training.state import TrainState
from results import check_arguments, machine

_ZERO = Path(__file__).parents[1] / "ds_configs" / "zero1.json"
_DEFAULTS = MonitorConfig()
# Step numbers of each kind, under the default intervals.
_KINDS = {"between": 2, "logged": _DEFAULTS.interval, "norms": _DEFAULTS.norms_interval or 0}


def time_own_calls(recorder: Recorder) -> list[float]:
    """Have a recorder note the seconds of each of its calls that observe or record, in the list that is returned."""
    seconds: list[float] = []

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **named: Any) -> None:
            wait_for_device()
            began = time.perf_counter()
            call(*arguments, **named)
            wait_for_device()
            seconds.append(time.perf_counter() - began)

        return run

    for name in ("observe", "observe_gradients", "record"):
        setattr(recorder, name, timed(getattr(recorder, name)))
    return seconds


def main() -> None:
    """Arguments and wiring."""
    given = parse_arguments()
    check_arguments(given, {"rounds": 1, "sequence_length": 1, "micro_batch_size": 1, "threads": 1}, given.json)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    os.environ.update(alone)
    torch.set_num_threads(given.threads)
    start_ranks()
    found = measure(given)
    report(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    torch.distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-small-8e", choices=list(PRESETS), help="default: gpt2-small-8e")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="steps of each kind (default: 8)")
    parser.add_argument("--sequence-length", type=int, default=1024, metavar="TOKENS", help="default: 1024")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="SEQUENCES", help="default: 1")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help="default: bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of this process on CPU (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, seconds of each step")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the preset's model")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps without metrics and of each kind of step with them, by name."""
    model = HyperMoEConfig(**apply_overrides(dict(PRESETS[given.preset]), given.overrides))
    train = TrainConfig(
        steps=10**6,
        micro_batch_size=given.micro_batch_size,
        global_batch_size=given.micro_batch_size,
        precision=given.precision,
    )
    optimizer = OptimizerConfig(lr=1e-12)  # routers that learn would change what a step takes
    ds_config = merge(load_deepspeed_json(_ZERO), train, model, 1, 1)
    engine = build_engine(model, ds_config, optimizer, ScheduleConfig(name="constant"), train, ParallelConfig())
    seconds: dict[str, list[float]] = {"off": [], **{kind: [] for kind in _KINDS}}
    own: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    with tempfile.TemporaryDirectory() as folder:
        recorder = recorder_of(engine, given, model, optimizer, Path(folder))
        calls = time_own_calls(recorder)
        batches = random_batches(model.vocab_size, given)
        for number in tqdm(range(given.rounds + 1), unit="round", leave=False):
            for kind, step in _KINDS.items():
                calls.clear()
                pair = time_of(engine, batches, None, 0), time_of(engine, batches, recorder, step)
                if number:  # the first one warms up
                    seconds["off"].append(pair[0])
                    seconds[kind].append(pair[1])
                    own[kind].append(sum(calls))
    return {
        "seconds": seconds,
        "own": own,
        "preset": given.preset,
        "tokens": given.micro_batch_size * given.sequence_length,
    }


def recorder_of(
    engine: Any, given: argparse.Namespace, model: HyperMoEConfig, optimizer: OptimizerConfig, folder: Path
) -> Recorder:
    """What logs a run with the defaults."""
    console = Console(rank=1)  # prints nothing
    flops = ModelFlops(training_flops_per_token(model, given.sequence_length), 1, None, None)
    profiler = Profiler(_DEFAULTS, folder, 0, engine.module, console.log)
    logger = MetricLogger(_DEFAULTS, folder, 0, 0)
    norms = ParameterNorms(engine, optimizer)
    return Recorder(engine, _DEFAULTS, 10**6, logger, console, flops, norms, None, profiler)


def random_batches(vocabulary: int, given: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """The same micro-batch again and again."""
    ids = torch.randint(0, vocabulary, (given.micro_batch_size, given.sequence_length + 1))
    while True:
        yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def time_of(engine: Any, batches: Iterator[dict[str, torch.Tensor]], recorder: Recorder | None, step: int) -> float:
    """Seconds of one step, with a recorder or without."""
    wait_for_device()
    began = time.perf_counter()
    if recorder is None:
        optimizer_step(engine, batches, StepObserver())
    else:
        recorder.begin(step)
        tokens = optimizer_step(engine, batches, recorder)
        recorder.end(step, tokens)
        if recorder.logs:
            recorder.record(TrainState(step=step, consumed_samples=step), lr=1e-12)
    wait_for_device()
    return time.perf_counter() - began


def wait_for_device() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(found: dict[str, Any]) -> None:
    """Print medians, ratios and the cost at the default intervals."""
    off = statistics.median(found["seconds"]["off"])
    own = {kind: statistics.median(found["own"][kind]) for kind in _KINDS}
    logged, norms = 1 / _DEFAULTS.interval, 1 / (_DEFAULTS.norms_interval or 1)
    shares = {"between": 1 - logged, "logged": logged - norms, "norms": norms}
    found["cost"] = sum(shares[kind] * own[kind] for kind in _KINDS) / off
    print("| step | of all steps | metrics, s | metrics / step without | whole step / step without |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind in _KINDS:
        whole = statistics.median(found["seconds"][kind]) / off
        print(f"| {kind} | {shares[kind]:.0%} | {own[kind]:.4f} | {own[kind] / off:.2%} | {whole:.3f} |")
    print(f"\nwithout metrics {off:.3f} s; cost at the default intervals: {found['cost']:.2%} of a step")
    about = machine("cuda" if torch.cuda.is_available() else "cpu")
    print(" | ".join([found["preset"], f"{found['tokens']} tokens a step", *(f"{k} {v}" for k, v in about.items())]))


if __name__ == "__main__":
    with one_line_errors():
        main()
