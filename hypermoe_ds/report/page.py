"""Build the HTML page of a report, with the data embedded as JSON."""

import base64
import html
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import numpy as np

from hypermoe_ds.monitor.metrics import METRICS, PAGES, PARAMETER_GROUPS, STEP_PARTS
from hypermoe_ds.report.downsampling import Floats, Ints, extremes, kept_positions
from hypermoe_ds.report.reading import Run, Series
from hypermoe_ds.report.summary import differing_settings, resumes, summary

_BYTES = 1_700_000  # for all curves, so that the whole page stays below 3 MB
_BYTES_PER_VALUE = 8
_MOST_POINTS = 2000
_MOST_BINS = 160
_LEVELS = 64  # byte value of a load that equals the mean load
_MOST_SAMPLES, _MOST_CHARACTERS = 60, 2000
_NOT_CURVES = ("time", "consumed_tokens")


def bins_per_run(runs: int) -> int:
    """Return the number of bins over time for the expert loads of each run."""
    return max(_MOST_BINS // runs, 30)


def build_page(runs: Sequence[Run]) -> str:
    """Return the page as HTML that needs no other file."""
    assets = files("hypermoe_ds.report") / "assets"
    parts = {name: (assets / file).read_text(encoding="utf-8") for name, file in _ASSETS.items()}
    page = parts.pop("page")
    title = ", ".join(run.name for run in runs)
    parts["title"] = html.escape(title)
    parts["data"] = _json_for_script(report_data(runs))
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text, 1)
    return page


_ASSETS = {
    "page": "page.html",
    "style": "page.css",
    "script": "page.js",
    "chart_style": "uPlot.min.css",
    "chart_script": "uPlot.iife.min.js",
}


def _json_for_script(data: Any) -> str:
    """Return JSON that is safe inside a script element: `</script>` and `<!--` are escaped."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def report_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the data of the page as values that JSON can represent."""
    count = sum(len(run.series) for run in runs)
    points = min(_MOST_POINTS, max(_BYTES // (count * _BYTES_PER_VALUE), 40))
    described = ("unit", "page", "meaning", "bad")
    metrics = {metric.name: {part: getattr(metric, part) for part in described} for metric in METRICS}
    all_settings = [(key, [value]) for key, value in runs[0].settings.items()]
    rows = [summary(run) for run in runs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "pages": dict(PAGES) | {"other": "Other"},
        "metrics": metrics,
        "order": [*STEP_PARTS, *PARAMETER_GROUPS],
        "summary": [[name, *(row.get(name, "") for row in rows)] for name in names],
        "settings": differing_settings(runs) if len(runs) > 1 else all_settings,
        "runs": [_run_data(run, points) for run in runs],
    }


def _run_data(run: Run, points: int) -> dict[str, Any]:
    newest = [sample for sample in run.samples if type(sample.get("step")) is int][-_MOST_SAMPLES:][::-1]
    return {
        "name": run.name,
        "groups": list(_groups(run, points)),
        "loads": _loads_data(run),
        "resumed": resumes(run),
        "samples": [
            [sample["step"], *(str(sample.get(part))[:_MOST_CHARACTERS] for part in ("prompt", "text"))]
            for sample in newest
        ],
    }


def _groups(run: Run, points: int) -> Iterator[dict[str, Any]]:
    """Group curves by the steps of their values; the curves of a group share their x axes."""
    by_steps: dict[bytes, list[str]] = defaultdict(list)
    for key, series in run.series.items():
        if key not in _NOT_CURVES:
            by_steps[series.steps.tobytes()].append(key)
    for keys in by_steps.values():
        steps = np.frombuffer(run.series[keys[0]].steps, dtype=np.int64)
        kept = kept_positions(len(steps), points)
        yield {
            "step": steps[kept].tolist(),
            "tokens": _axis(run.series.get("consumed_tokens"), steps, kept, 1e6),
            "hours": _axis(run.series.get("time"), steps, kept, 3600.0, from_zero=True),
            "curves": {key: _rounded(extremes(run.series[key].numbers, points)) for key in keys},
        }


def _axis(
    series: Series | None, steps: Ints, kept: Ints, unit: float, from_zero: bool = False
) -> list[float | None] | None:
    """Interpolate a metric at the kept steps, for use as an x axis; return None if the run lacks the metric."""
    if series is None:
        return None
    values, at = series.numbers, np.frombuffer(series.steps, dtype=np.int64)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    # A validation record has the same step as the record before it, so use the later time.
    interpolated = np.interp(steps[kept], at[finite], np.maximum.accumulate(values[finite]))
    return _rounded((interpolated - (values[finite][0] if from_zero else 0)) / unit, digits=7)


def _rounded(values: Floats, digits: int = 5) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


def _loads_data(run: Run) -> dict[str, Any] | None:
    """Return load / mean load with one byte per value, in the order [bins, layers, experts]."""
    if run.loads is None:
        return None
    steps, relative = run.loads
    levels = np.clip(np.round(relative * _LEVELS), 0, 255).astype(np.uint8)
    _, layers, experts = levels.shape
    packed = base64.b64encode(levels.tobytes()).decode()
    return {"step": steps.tolist(), "layers": layers, "experts": experts, "levels": _LEVELS, "bytes": packed}
