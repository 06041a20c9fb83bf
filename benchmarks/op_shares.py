"""Sum the profiled times of operators by category."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]

# The first pattern that matches a name determines its category. Names are operators on CPU and kernels on GPU.
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("communication", r"gloo|nccl|c10d|all_?reduce|all_?to_?all|all_?gather|reduce_?scatter|broadcast_|allreduce"),
    ("optimizer", r"adam|optimizer|multi_tensor|foreach"),
    ("attention", r"scaled_dot_product|flash|fmha|attention|sdpa"),
    ("cross-entropy", r"log_softmax|nll_loss|cross_entropy|LogSoftMax"),
    ("GEMM", r"::mm|addmm|bmm|matmul|grouped_mm|mkldnn_linear|::linear|gemm|cutlass|cublas|nvjet|xmma"),
)
OTHER = "elementwise and other"
_NAMED = 8  # number of operators in the category `OTHER` that get their own row
CATEGORIES = (*(name for name, _ in _PATTERNS), OTHER)
HOW = (
    "Self times of one profiled rank, summed by name: operators on CPU, kernels on GPU. "
    + "; ".join(f"{name}: `{pattern}`" for name, pattern in _PATTERNS).replace("|", "\\|")
    + f"; {OTHER}: all others, including copies and routing. The first match in this order counts. Communication "
    "overlaps with other work, and its time includes waiting, so the sum can exceed the step time."
)


def category(name: str) -> str:
    """Return the category of an operator or kernel."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def shares(events: Iterable[Any], steps: int) -> dict[str, float]:
    """Return the milliseconds per step of each category and of each operator in the category `OTHER`.

    Args:
        events: `profiler.key_averages()`.
        steps: number of profiled steps.
    """
    on_cpu = [(event.key, event.self_cpu_time_total) for event in events if event.device_type == DeviceType.CPU]
    kernels = [
        (event.key, event.self_device_time_total)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.key.startswith(("Optimizer.", "nccl:", "ProfilerStep"))
    ]  # the excluded events are annotations that span other kernels
    sums = dict.fromkeys(CATEGORIES, 0.0)
    named: dict[str, float] = {}
    for name, microseconds in kernels or on_cpu:
        kind = category(name)
        sums[kind] += microseconds / 1e3 / steps
        if kind == OTHER:
            named[f"{OTHER}: {name[:60]}"] = microseconds / 1e3 / steps
    return sums | named


def markdown(milliseconds_of_sides: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table with the share and the milliseconds per step of each category, for each side."""
    sides = list(milliseconds_of_sides)
    totals = {side: sum(milliseconds_of_sides[side][kind] for kind in CATEGORIES) or 1.0 for side in sides}
    named = {name for side in sides for name in milliseconds_of_sides[side]} - set(CATEGORIES)
    longest = {name: max(side.get(name, 0.0) for side in milliseconds_of_sides.values()) for name in named}
    largest = sorted(named, key=lambda name: -longest[name])[:_NAMED]
    lines = [
        "| category | " + " | ".join(f"{side}, share | {side}, ms" for side in sides) + " |",
        "| --- |" + " ---: |" * (2 * len(sides)),
    ]
    for kind in (*CATEGORIES, *largest):
        values = [(milliseconds_of_sides[side].get(kind, 0.0), totals[side]) for side in sides]
        cells = [f"{value / total:.1%} | {value:,.1f}" for value, total in values]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines.append("| sum | " + " | ".join(f"100 % | {totals[side]:,.1f}" for side in sides) + " |")
    return "\n".join([*lines, "", HOW, ""])
