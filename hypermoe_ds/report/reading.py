"""Read a run folder in one pass, without keeping its records in memory."""

import json
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hypermoe_ds.errors import UserError
from hypermoe_ds.files import distinct_names
from hypermoe_ds.monitor.summary import iterate_records, json_objects
from hypermoe_ds.progress import Progress
from hypermoe_ds.report.downsampling import Bins, Floats, Ints

_FILES = ("launches.jsonl", "supervisor.jsonl", "samples.jsonl")
_LOAD = "expert_load/moe_layer_"


@dataclass
class Series:
    """Values of a metric over the run.

    Attributes:
        steps: step of each value.
        values: value at each of these steps; NaN where a record has null.
    """

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float | None) -> None:
        """Add a value."""
        self.steps.append(step)
        self.values.append(np.nan if value is None else value)

    @property
    def numbers(self) -> Floats:
        """Return the values as an array."""
        return np.frombuffer(self.values, dtype=np.float64) if self.values else np.empty(0)


@dataclass
class Run:
    """Contents of a run folder.

    Attributes:
        name: label, distinct among the runs of a report.
        path: the run folder.
        series: values of each metric by its key.
        loads: first step of each bin, and load / mean load [bins, layers, experts]; None for a dense model.
        launches: lines of launches.jsonl.
        attempts: lines of supervisor.jsonl.
        samples: lines of samples.jsonl.
        settings: resolved settings by dotted key.
    """

    name: str
    path: Path
    series: dict[str, Series]
    loads: tuple[Ints, Floats] | None
    launches: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    settings: dict[str, str]

    def last(self, key: str) -> float | None:
        """Return the last finite value of a metric, or None if there is no finite value."""
        numbers = self.series[key].numbers if key in self.series else np.empty(0)
        finite = numbers[np.isfinite(numbers)]
        return float(finite[-1]) if len(finite) else None


def read_run(path: Path, name: str, bins: int) -> Run:
    """Read a run folder.

    Args:
        path: the run folder.
        name: label of the run.
        bins: target number of bins for the expert loads over time.

    Raises:
        UserError: the folder has no metrics.
    """
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(str(path), "has no metrics.jsonl", "give the run folder (run.dir) of a run that has trained")
    series, loads = _read_metrics(metrics, bins)
    if not series:
        raise UserError(str(metrics), "has no record", "wait for the first logged step")
    files = (path / file_name for file_name in _FILES)
    launches, attempts, samples = (list(json_objects(file)) if file.is_file() else [] for file in files)
    return Run(name, path, series, loads, launches, attempts, samples, _settings(path / "resolved"))


def _read_metrics(metrics: Path, bins: int) -> tuple[dict[str, Series], tuple[Ints, Floats] | None]:
    series: dict[str, Series] = {}
    loads, shape = Bins(bins), None
    with Progress(f"reading {metrics}", "records") as progress:
        for record in iterate_records(metrics):
            step = record.pop("step")
            load_keys = [key for key in record if key.startswith(_LOAD)]
            rows = [record.pop(key) for key in load_keys]
            for key, value in record.items():
                if value is None or type(value) in (int, float):
                    series.setdefault(key, Series()).add(step, value)
            relative = _relative_loads(rows)
            if relative is not None and shape in (None, relative.shape):
                shape = relative.shape
                loads.add(step, relative)
            progress.update()
    return series, loads.read() if shape is not None else None


def _relative_loads(rows: list[Any]) -> Floats | None:
    """Return load / mean load [layers, experts]; None if the rows do not form a matrix of finite numbers."""
    if not rows:
        return None
    with suppress(TypeError, ValueError):
        loads = np.array(rows, dtype=np.float64)
        if loads.ndim == 2 and np.isfinite(loads).all():
            relative: Floats = loads * loads.shape[1]
            return relative
    return None


def _settings(folder: Path) -> dict[str, str]:
    settings: dict[str, str] = {}
    with suppress(OSError, ValueError, yaml.YAMLError):
        settings |= flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    with suppress(OSError, ValueError):
        settings |= flat({"deepspeed": json.loads((folder / "deepspeed.json").read_text(encoding="utf-8"))})
    return settings


def flat(settings: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested settings into dotted keys with JSON values."""
    if not isinstance(settings, Mapping) or not settings:
        return {prefix: json.dumps(settings, default=str)}  # YAML can contain dates, which JSON cannot represent
    flattened: dict[str, str] = {}
    for key, value in settings.items():
        flattened |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flattened


def labels(paths: Iterable[Path]) -> list[str]:
    """Return a distinct label for each run folder: the shortest unique end of its path, numbered if paths are equal."""
    return distinct_names([path.resolve().parts for path in paths], "/", "{} ({})")
