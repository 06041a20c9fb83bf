"""Test the summary of a run from its records."""

import json
import math
from pathlib import Path

import pytest

from hypermoe_ds.errors import UserError
from hypermoe_ds.monitor.summary import read_records, summarize, validation_at

RECORDS = [
    {"step": 1, "tokens_per_second": 1.0, "consumed_samples": 8},
    {"step": 5, "tokens_per_second": 30.0, "consumed_samples": 40},
    {"step": 5, "valid_loss": 3.0},
    {"step": 9, "tokens_per_second": 20.0, "consumed_samples": 72},
    {"step": 9, "valid_loss": 2.5},
]


def write(path: Path, records: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_summary_has_last_step_last_validation_and_median_rate(tmp_path: Path) -> None:
    summary = summarize(write(tmp_path / "metrics.jsonl", RECORDS))
    assert (summary.step, summary.consumed_samples, summary.valid_loss) == (9, 72, 2.5)
    assert summary.tokens_per_second == 20


@pytest.mark.parametrize("kept", ["valid_loss", "tokens_per_second", "nothing"])
def test_run_without_steps_or_validation_is_refused(tmp_path: Path, kept: str) -> None:
    path = write(tmp_path / "metrics.jsonl", [record for record in RECORDS if kept in record])
    with pytest.raises(UserError, match="has no step or no validation"):
        summarize(path)
    with pytest.raises(UserError, match="no such file"):
        summarize(tmp_path / "none.jsonl")


def test_last_validation_of_a_diverged_run_is_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = ['{"step": 9, "valid_loss": {}}', '{"step": 9, "tokens_per_second": 1}', '{"step": 9, "valid_loss": "x"}']
    last = ['{"step": 9, "valid_loss": null}', *damaged]
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:-1]) + "\n".join(last))
    summary = summarize(path)
    assert summary.consumed_samples == 72
    assert math.isnan(summary.valid_loss)


def test_validation_at_returns_the_loss_of_that_step_or_none(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", RECORDS)
    assert [validation_at(path, step) for step in (1, 5, 6, 9)] == [None, 3.0, None, 2.5]
    assert validation_at(tmp_path / "none.jsonl", 9) is None


def test_lines_that_are_not_records_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1, "name": "\xe2\x80\xa8"}',
        b"\xff\xfe\0",
        b"3",
        b"null",
        b"{}",
        b'{"step": "2"}',
        10**6 * b"[",
    ]
    path.write_bytes(b"\n".join([*lines, b'{"step": 2}', b'{"step": 3, "lo']))
    assert [record["step"] for record in read_records(path)] == [1, 2]
