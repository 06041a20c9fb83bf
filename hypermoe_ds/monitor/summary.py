"""Summarise a run from its metrics."""

import math
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from hypermoe_ds.errors import UserError

_LOSSES = (int, float, type(None))  # NaN and infinity are written as null


@dataclass(frozen=True)
class RunSummary:
    """Result of a run.

    Attributes:
        step: last logged optimizer step.
        consumed_samples: number of training sequences consumed.
        tokens_per_second: tokens per second of all ranks together, median over the records.
        valid_loss: last validation loss in nats per token; NaN if the model has diverged.
    """

    step: int
    consumed_samples: int
    tokens_per_second: float
    valid_loss: float


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one per line; skip damaged lines, such as the last line of a killed run."""
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                entry = from_json(line)
                if isinstance(entry, dict):
                    yield entry


def iterate_records(metrics: Path) -> Iterator[dict[str, Any]]:
    """Yield, in order, the records of a metrics.jsonl file that contain a step."""
    return (record for record in json_objects(metrics) if type(record.get("step")) is int)


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """Return the records in a metrics.jsonl file."""
    return list(iterate_records(metrics))


def validation_at(metrics: Path, step: int) -> float | None:
    """Return the validation loss after `step` in nats per token; None if that step was not validated."""
    if not metrics.is_file():
        return None
    losses = [
        record["valid_loss"] for record in iterate_records(metrics) if record["step"] == step and "valid_loss" in record
    ]
    return losses[-1] if losses else None


def summarize(metrics: Path) -> RunSummary:
    """Summarise a metrics.jsonl file.

    Raises:
        UserError: the file is missing, or has no training step or no validation.
    """
    if not metrics.is_file():
        raise UserError(str(metrics), "no such file", "give the folder of a run that has trained")
    records = read_records(metrics)
    steps = [
        record
        for record in records
        if type(record.get("tokens_per_second")) in (int, float) and type(record.get("consumed_samples")) is int
    ]
    losses = [record["valid_loss"] for record in records if type(record.get("valid_loss", "")) in _LOSSES]
    if not steps or not losses:
        raise UserError(str(metrics), "has no step or no validation", "train with data.valid to the end")
    return RunSummary(
        step=steps[-1]["step"],
        consumed_samples=steps[-1]["consumed_samples"],
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in steps),
        valid_loss=math.nan if losses[-1] is None else losses[-1],
    )
