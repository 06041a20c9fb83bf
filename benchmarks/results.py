"""Summarize a comparison of training steps: medians, ratios and a description of the machine."""

import os
import platform
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import UserError
from hypermoe_ds.monitor.flops import peak_tflops
from step_settings import StepSettings


@dataclass
class Measurement:
    """Measurements of the ranks of one side.

    Attributes:
        device: name of the GPU, or "cpu".
        parameters: number of parameters of the whole model.
        seconds: time of each step on the slowest rank.
        losses: loss of each step, averaged over the ranks, in nats per token.
        peak_memory_gib: peak memory of each rank.
        profile: milliseconds per step by operator category; empty if the side was not profiled.
    """

    device: str = ""
    parameters: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_memory_gib: list[float] = field(default_factory=list)
    profile: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SideSummary:
    """Summary of one side. `mfu` is None if the peak FLOP/s of the device are unknown."""

    parameters: int
    median_seconds: float
    min_seconds: float
    max_seconds: float
    tokens_per_second: float
    peak_memory_gib: list[float]
    mfu: float | None
    step_seconds: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Ratios:
    """Median step time and largest peak memory of any rank, divided by the values of the baseline."""

    step_time: float
    peak_memory: float


@dataclass(frozen=True)
class Comparison:
    """All results of one comparison, in the structure of the JSON file."""

    baseline: str
    ratios: dict[str, Ratios]
    sides: dict[str, SideSummary]
    settings: StepSettings
    machine: dict[str, Any]
    profile_milliseconds: dict[str, dict[str, float]]


def check_arguments(arguments: Namespace, minimum: Mapping[str, int], *outputs: Path | None) -> None:
    """Refuse invalid arguments before the measurement starts.

    Raises:
        UserError: a number is less than its entry of `minimum`, or the folder of an output does not exist.
    """
    for name, smallest in minimum.items():
        value = getattr(arguments, name)
        if isinstance(value, int) and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value}", "is too small", f"give at least {smallest}")
    for path in outputs:
        if path is not None and not path.parent.is_dir():
            raise UserError(str(path), "is in a folder that does not exist", "create the folder")


def choose_baseline(sides: Sequence[str]) -> str:
    """Return the baseline of the ratios: the plain Mixture of Experts if it is one of the sides, else the last side."""
    return "moe" if "moe" in sides else sides[-1]


def summarize(side: Measurement, tokens: int, flops_per_token: int, peak: float | None) -> SideSummary:
    """Summarize one side.

    Args:
        side: measurement of the side.
        tokens: tokens per step, over all ranks.
        flops_per_token: FLOPs of the forward and backward pass per token, without recomputation.
        peak: peak FLOP/s of all devices together; None if unknown.
    """
    seconds = median(side.seconds)
    return SideSummary(
        parameters=side.parameters,
        median_seconds=seconds,
        min_seconds=min(side.seconds),
        max_seconds=max(side.seconds),
        tokens_per_second=tokens / seconds,
        peak_memory_gib=side.peak_memory_gib,
        mfu=flops_per_token * tokens / seconds / peak if peak else None,
        step_seconds=side.seconds,
        losses=side.losses,
    )


def compare(measured: Mapping[str, Measurement], settings: StepSettings) -> Comparison:
    """Summarize the measured sides and compare each side with the baseline."""
    device = next(iter(measured.values())).device
    tflops = peak_tflops(device, settings.precision)
    peak = None if tflops is None else tflops * 1e12 * settings.ranks
    sides = {}
    for name, side in measured.items():
        flops = 3 * settings.model_config(name).forward_flops_per_token(settings.sequence_length)
        sides[name] = summarize(side, settings.tokens_per_step, flops, peak)
    baseline = choose_baseline(list(sides))
    return Comparison(
        baseline=baseline,
        ratios={name: divide(side, sides[baseline]) for name, side in sides.items()},
        sides=sides,
        settings=settings,
        machine=machine(device),
        profile_milliseconds={name: side.profile for name, side in measured.items() if side.profile},
    )


def divide(side: SideSummary, baseline: SideSummary) -> Ratios:
    """Divide the time and memory of a side by the values of the baseline."""
    return Ratios(
        step_time=side.median_seconds / baseline.median_seconds,
        peak_memory=max(side.peak_memory_gib) / max(baseline.peak_memory_gib),
    )


def device_name() -> str:
    """Return the name of the GPU, or "cpu" without one."""
    return torch.cuda.get_device_name() if uses_gpu() else "cpu"


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the versions of the libraries."""
    names = ("torch", "deepspeed", "transformers")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


def machine_line(device: str) -> str:
    """Describe the machine in one line, to print below a table."""
    return " | ".join(f"{key} {value}" for key, value in machine(device).items())


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as a dict for JSON."""
    return asdict(comparison)


def as_table(comparison: Comparison) -> str:
    """Format the comparison as a Markdown table, followed by the settings and the machine."""
    baseline = comparison.baseline
    head = f"| side | time / {baseline} | memory / {baseline} | step, s: median (min, max) "
    lines = [head + "| tokens/s | peak memory, GiB a rank | MFU | parameters |", "| --- |" + " ---: |" * 7]
    for name, side in comparison.sides.items():
        ratio = comparison.ratios[name]
        peaks = ", ".join(f"{gib:.2f}" for gib in side.peak_memory_gib)
        lines.append(
            f"| {name} | {ratio.step_time:.3f} | {ratio.peak_memory:.3f} "
            f"| {side.median_seconds:.3f} ({side.min_seconds:.3f}, {side.max_seconds:.3f}) "
            f"| {side.tokens_per_second:,.0f} | {peaks} | {_percent(side.mfu)} "
            f"| {side.parameters / 1e6:,.1f} M |"
        )
    s = comparison.settings
    order = f"one side at a time, rounds: {s.in_turns}" if s.in_turns else "sides alternate"
    lines += [
        "",
        f"{', '.join([s.preset, *s.overrides])} | ranks {s.ranks}, expert parallelism {s.expert_parallel}, "
        f"CPU threads per rank {s.threads} | {s.precision}, sequences per rank {s.micro_batch_size} of "
        f"{s.sequence_length} tokens, micro-batches per step {s.accumulation}"
        f"{', activation checkpointing' if s.activation_checkpointing else ''} | "
        f"{s.steps} steps after {s.warmup}, {order}",
        " | ".join(f"{key} {value}" for key, value in comparison.machine.items()),
    ]
    return "\n".join(lines) + "\n"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
