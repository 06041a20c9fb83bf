"""What a comparison of training steps found: medians, ratios, the machine, as a JSON object and as text."""

import os
import platform
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.monitor.flops import peak_tflops


def check_arguments(given: Namespace, at_least: Mapping[str, int], *outputs: Path | None) -> None:
    """Refuse before anything is measured.

    Raises:
        UserError: a number is less than `at_least` says for its name, or an output's folder does not exist.
    """
    for name, least in at_least.items():
        value = getattr(given, name)
        if isinstance(value, int) and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}", "too small", f"give at least {least}")
    for path in outputs:
        if path is not None and not path.parent.is_dir():
            raise UserError(str(path), "its folder does not exist", "make the folder")


def baseline_of(sides: Sequence[str]) -> str:
    """The side that the others are divided by: the plain Mixture of Experts where it takes part, else the last."""
    return "moe" if "moe" in sides else sides[-1]


def summary(side: Mapping[str, Any], tokens: int, flops_per_token: int, peak: float | None) -> dict[str, Any]:
    """Numbers of one side.

    Args:
        side: `seconds` of each step, `losses`, `peak_memory_gib` of each rank, `parameters`.
        tokens: tokens of a step over all ranks.
        flops_per_token: FLOPs of one token's forward, backward and update; recomputation is not counted.
        peak: FLOP/s of all devices together.
    """
    middle = median(side["seconds"])
    return {
        "parameters": side["parameters"],
        "median_seconds": middle,
        "min_seconds": min(side["seconds"]),
        "max_seconds": max(side["seconds"]),
        "tokens_per_second": tokens / middle,
        "peak_memory_gib": side["peak_memory_gib"],
        "mfu": flops_per_token * tokens / middle / peak if peak else None,
        "step_seconds": side["seconds"],
        "losses": side["losses"],
    }


def result(measured: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Everything of one comparison, ready for JSON."""
    device = next(iter(measured.values()))["device"]
    tokens = ranks * settings["accumulation"] * settings["micro_batch_size"] * settings["sequence_length"]
    tflops = peak_tflops(device, settings["precision"])
    peak = None if tflops is None else tflops * 1e12
    sides = {}
    for name, side in measured.items():
        config = HyperMoEConfig(**{**settings["model"], "hypernetwork": name in ("hypermoe", "per_token")})
        flops = 3 * config.forward_flops_per_token(settings["sequence_length"])
        sides[name] = summary(side, tokens, flops, peak * ranks if peak else None)
    baseline = baseline_of(list(sides))
    return {
        "baseline": baseline,
        "ratios": {name: ratios(side, sides[baseline]) for name, side in sides.items()},
        "sides": sides,
        "settings": {**settings, "ranks": ranks},
        "machine": machine(device),
    }


def ratios(side: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    """Median step time and peak memory (of the fullest rank) over those of the baseline."""
    return {
        "step_time": side["median_seconds"] / baseline["median_seconds"],
        "peak_memory": max(side["peak_memory_gib"]) / max(baseline["peak_memory_gib"]),
    }


def device_name() -> str:
    """The GPU's name, or cpu where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured."""
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


def text(found: Mapping[str, Any]) -> str:
    """The table, ratios first, and below it what it was measured on."""
    head = f"| side | time / {found['baseline']} | memory / {found['baseline']} | step, s: median (min, max) "
    lines = [head + "| tokens/s | peak memory, GiB a rank | MFU | parameters |", "| --- |" + " ---: |" * 7]
    for name, side in found["sides"].items():
        ratio = found["ratios"][name]
        peaks = ", ".join(f"{gib:.2f}" for gib in side["peak_memory_gib"])
        lines.append(
            f"| {name} | {ratio['step_time']:.3f} | {ratio['peak_memory']:.3f} "
            f"| {side['median_seconds']:.3f} ({side['min_seconds']:.3f}, {side['max_seconds']:.3f}) "
            f"| {side['tokens_per_second']:,.0f} | {peaks} | {_percent(side['mfu'])} "
            f"| {side['parameters'] / 1e6:,.1f} M |"
        )
    s = found["settings"]
    model = ", ".join([s["preset"], *s["overrides"]])
    order = f"a side at a time, rounds: {s['in_turns']}" if s["in_turns"] else "sides alternate"
    lines += [
        "",
        f"{model} | ranks {s['ranks']}, expert parallelism {s['expert_parallel']}, CPU threads a rank {s['threads']} | "
        f"{s['precision']}, {s['micro_batch_size']} sequences a rank of {s['sequence_length']} tokens, "
        f"micro-batches a step: {s['accumulation']}{', recomputed layers' if s['activation_checkpointing'] else ''} | "
        f"{s['steps']} steps after {s['warmup']}, {order}",
        " | ".join(f"{key} {value}" for key, value in found["machine"].items()),
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
