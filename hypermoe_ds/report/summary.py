"""Compute the numbers at the top of a report."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hypermoe_ds.monitor.units import duration, readable
from hypermoe_ds.report.downsampling import Floats
from hypermoe_ds.report.reading import Run

_GAP = 10  # an interval between records is a pause if it exceeds the median interval by this factor


def summary(run: Run) -> dict[str, str]:
    """Return the results of a run as texts by name; unknown values are omitted."""
    rows = {
        "step": _number(_last_step(run), ",.0f"),
        "tokens": _readable(run.last("consumed_tokens")),
        "validation loss, last": _number(run.last("valid_loss"), ".4f", " nats/token"),
        "validation loss, best": _best(run),
        "perplexity, last": _number(run.last("valid_perplexity"), ",.2f"),
        "bits per byte, last": _number(run.last("valid_bits_per_byte"), ".4f"),
        "HyperExperts contribute": _number(run.last("hyper_expert_contribution"), "+.4f", " nats/token"),
        "training loss, last": _number(run.last("loss"), ".4f"),
        "time trained": _time(trained_seconds(run)),
        "time, first to last record": _time(_span(run)),
        "tokens/s, median": _number(_median(run, "tokens_per_second"), ",.0f"),
        "TFLOP/s per GPU, median": _number(_median(run, "tflops_per_gpu"), ",.1f"),
        "MFU, median": _number(_median(run, "mfu"), ".1%"),
        "parameters": _parameters(run),
        "ranks": _ranks(run),
        "skipped steps": _number(run.last("skipped_steps"), ",.0f"),
        "restarts": "; ".join(restarts(run)) or "none",
    }
    return {name: text for name, text in rows.items() if text}


def restarts(run: Run) -> list[str]:
    """Return a line for each launch after the first: its first step, and why the previous launch ended."""
    launches = [entry for entry in run.launches if "ended" not in entry and type(entry.get("step")) is int]
    lines = []
    for previous, launch in pairwise(launches):
        cause = _cause(run, previous.get("time", 0), launch.get("time", 0))
        lines.append(f"from step {launch['step']:,}{': ' * bool(cause)}{cause}")
    return lines


def _cause(run: Run, begin: float, end: float) -> str:
    """Return why a launch ended between the times `begin` and `end`; "" if unknown."""
    attempts = [
        f"{attempt.get('outcome')}, {attempt.get('what', '')}".rstrip(", ")
        for attempt in run.attempts
        if isinstance(attempt.get("began"), float | int) and isinstance(attempt.get("seconds"), float | int)
        if begin <= attempt["began"] + attempt["seconds"] <= end
    ]
    own = [str(entry["ended"]) for entry in run.launches if "ended" in entry and begin <= entry.get("time", 0) <= end]
    return (attempts or own or [""])[-1]


def resumes(run: Run) -> list[int]:
    """Return the steps from which a launch continued the run."""
    steps = [entry.get("step") for entry in run.launches if "ended" not in entry]
    return [step for step in steps if type(step) is int and step > 0]


def trained_seconds(run: Run) -> float | None:
    """Return the time between the first and the last record, with each pause shortened to the median interval."""
    gaps = np.diff(_times(run))
    gaps = gaps[gaps > 0]
    if not len(gaps):
        return None
    median = float(np.median(gaps))
    return float(np.where(gaps > _GAP * median, median, gaps).sum())


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between runs, with the value of each run; "" if a run lacks the setting."""
    keys = sorted({key for run in runs for key in run.settings})
    rows = [(key, [run.settings.get(key, "") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _last_step(run: Run) -> float:
    return max(series.steps[-1] for series in run.series.values())


def _times(run: Run) -> Floats:
    """Return the time of each record in seconds."""
    times = run.series["time"].numbers if "time" in run.series else np.empty(0)
    return times[np.isfinite(times)]


def _span(run: Run) -> float | None:
    times = _times(run)
    return float(times.max() - times.min()) if len(times) else None


def _best(run: Run) -> str:
    if run.last("valid_loss") is None:
        return ""
    series = run.series["valid_loss"]
    best = int(np.nanargmin(series.numbers))
    return f"{series.numbers[best]:.4f} nats/token at step {series.steps[best]:,}"


def _median(run: Run, key: str) -> float | None:
    return float(np.nanmedian(run.series[key].numbers)) if run.last(key) is not None else None


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{spec}}{unit}"


def _readable(value: float | None) -> str:
    return "" if value is None else readable(value)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _parameters(run: Run) -> str:
    known = [entry["parameters"] for entry in run.launches if isinstance(entry.get("parameters"), dict)]
    counts: dict[str, Any] = known[-1] if known else {}
    return ", ".join(f"{readable(count)} {name}" for name, count in counts.items() if isinstance(count, int))


def _ranks(run: Run) -> str:
    launch = next((entry for entry in run.launches[::-1] if "world_size" in entry), None)
    return "" if launch is None else f"{launch['world_size']} x {launch.get('device', 'unknown')}"
