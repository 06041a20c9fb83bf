"""Measure the cost of metrics in a run on one rank. Steps with and without metrics alternate.

There are three kinds of steps with metrics: not logged, logged, and logged with norms. For each kind, the table shows
the seconds spent in metric calls, with a device synchronization before and after each call. The table also shows the
time of the whole step relative to a step without metrics, which is a noisier measurement. The total cost is weighted by
the share of each kind in a run with the default intervals. A key=value argument overrides a field of the preset's
model, such as num_hidden_layers=2.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hypermoe_ds.config import apply_overrides
from hypermoe_ds.device import uses_gpu
from hypermoe_ds.modeling import PRESETS, HyperMoEConfig
from hypermoe_ds.monitor.console import Console
from hypermoe_ds.monitor.flops import ModelFlops, training_flops_per_token
from hypermoe_ds.monitor.logger import MetricLogger
from hypermoe_ds.monitor.settings import MonitorConfig
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.training.ds_config import load_deepspeed_json, merge
from hypermoe_ds.training.engine import build_engine, start_ranks
from hypermoe_ds.training.loop import optimizer_step
from hypermoe_ds.training.norms import ParameterNorms
from hypermoe_ds.training.profiling import Profiler
from hypermoe_ds.training.recorder import Recorder
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.step_observer import StepObserver
from results import check_arguments, machine_line

_ZERO = Path(__file__).parents[1] / "ds_configs" / "zero1.json"
_DEFAULTS = MonitorConfig()
# For each kind, the number of a step that is of this kind at the default intervals.
_KINDS = {"not logged": 2, "logged": _DEFAULTS.interval, "norms": _DEFAULTS.norms_interval or 0}


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the whole step and of its metric calls, for each step of one kind."""

    whole: list[float]
    metrics: list[float]


@dataclass(frozen=True)
class Results:
    """Seconds of each step without metrics, and times of the steps with metrics by kind."""

    without: list[float]
    with_metrics: dict[str, StepTimes]


def time_metric_calls(recorder: Recorder) -> list[float]:
    """Patch a recorder's `observe` and `record` methods to append their seconds to a list, and return the list."""
    seconds: list[float] = []

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            wait_for_device()
            began = time.perf_counter()
            call(*args, **kwargs)
            wait_for_device()
            seconds.append(time.perf_counter() - began)

        return run

    for name in ("observe", "observe_gradients", "record"):
        setattr(recorder, name, timed(getattr(recorder, name)))
    return seconds


def main() -> None:
    """Run the benchmark and print the results."""
    arguments = parse_arguments()
    check_arguments(arguments, {"rounds": 1, "sequence_length": 1, "micro_batch_size": 1, "threads": 1}, arguments.json)
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    os.environ.update(one_rank)
    torch.set_num_threads(arguments.threads)
    start_ranks()
    results = measure(arguments)
    report(results, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(results), indent=1) + "\n", "utf-8")
    torch.distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-small-8e", choices=list(PRESETS), help="default: gpt2-small-8e")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="steps of each kind (default: 8)")
    parser.add_argument("--sequence-length", type=int, default=1024, metavar="TOKENS", help="default: 1024")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="SEQUENCES", help="default: 1")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help="default: bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the seconds of each step to")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the preset's model")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> Results:
    """Measure steps without metrics and each kind of step with metrics."""
    model = HyperMoEConfig(**apply_overrides(dict(PRESETS[arguments.preset]), arguments.overrides))
    train = TrainConfig(
        steps=10**6,
        micro_batch_size=arguments.micro_batch_size,
        global_batch_size=arguments.micro_batch_size,
        precision=arguments.precision,
    )
    optimizer = OptimizerConfig(lr=1e-12)  # a higher learning rate would train the routers and change the step time
    ds_config = merge(load_deepspeed_json(_ZERO), train, model, 1, 1)
    engine = build_engine(model, ds_config, optimizer, ScheduleConfig(name="constant"), train, ParallelConfig())
    results = Results([], {kind: StepTimes([], []) for kind in _KINDS})
    with tempfile.TemporaryDirectory() as folder:
        recorder = recorder_of(engine, arguments, model, optimizer, Path(folder))
        calls = time_metric_calls(recorder)
        batches = random_batches(model.vocab_size, arguments)
        for number in tqdm(range(arguments.rounds + 1), unit="round", leave=False):
            for kind, step in _KINDS.items():
                calls.clear()
                without = time_of(engine, batches, None, 0)
                whole = time_of(engine, batches, recorder, step)
                if number:  # the first round is a warm-up
                    results.without.append(without)
                    results.with_metrics[kind].whole.append(whole)
                    results.with_metrics[kind].metrics.append(sum(calls))
    return results


def recorder_of(
    engine: Any, arguments: argparse.Namespace, model: HyperMoEConfig, optimizer: OptimizerConfig, folder: Path
) -> Recorder:
    """Build the recorder of a run with the default settings."""
    console = Console(rank=1)  # prints nothing
    per_token = training_flops_per_token(model, arguments.sequence_length)
    flops = ModelFlops(lambda _: per_token, 1, None, None)
    profiler = Profiler(_DEFAULTS, folder, 0, engine.module, console.log)
    logger = MetricLogger(_DEFAULTS, folder, 0, 0)
    norms = ParameterNorms(engine, optimizer)
    return Recorder(engine, _DEFAULTS, 10**6, logger, console, flops, norms, None, profiler)


def random_batches(vocabulary: int, arguments: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the same random micro-batch forever."""
    ids = torch.randint(0, vocabulary, (arguments.micro_batch_size, arguments.sequence_length + 1))
    while True:
        yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def time_of(engine: Any, batches: Iterator[dict[str, torch.Tensor]], recorder: Recorder | None, step: int) -> float:
    """Run one step with or without a recorder, and return its time in seconds."""
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
    """Synchronize with the GPU, if available."""
    if uses_gpu():
        torch.cuda.synchronize()


def report(results: Results, arguments: argparse.Namespace) -> None:
    """Print medians, ratios and the total cost at the default intervals."""
    without = statistics.median(results.without)
    logged, norms = 1 / _DEFAULTS.interval, 1 / (_DEFAULTS.norms_interval or 1)
    shares = {"not logged": 1 - logged, "logged": logged - norms, "norms": norms}
    print("| step | share of all steps | metrics, s | metrics / step without | whole step / step without |")
    print("| --- | ---: | ---: | ---: | ---: |")
    cost = 0.0
    for kind, times in results.with_metrics.items():
        metrics, whole = statistics.median(times.metrics), statistics.median(times.whole)
        cost += shares[kind] * metrics / without
        print(f"| {kind} | {shares[kind]:.0%} | {metrics:.4f} | {metrics / without:.2%} | {whole / without:.3f} |")
    print(f"\na step without metrics {without:.3f} s; cost at the default intervals: {cost:.2%} of a step")
    tokens = arguments.micro_batch_size * arguments.sequence_length
    device = "cuda" if uses_gpu() else "cpu"
    print(f"{arguments.preset} | {tokens} tokens per step | {machine_line(device)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
