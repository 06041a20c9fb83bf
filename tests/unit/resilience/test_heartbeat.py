"""A sign of life that cannot be read is none."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from hypermoe_ds.resilience.heartbeat import Heartbeat, heartbeat_path, read_heartbeats

SIGN = Heartbeat(0, "here", 7, 3, "waiting", passed=2, beats=5, began=1.5)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    SIGN.write(tmp_path)
    assert read_heartbeats(tmp_path) == {0: SIGN}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"3",
        200_000 * b"[",
        b"{}",
        json.dumps({**asdict(SIGN), "process": "7"}).encode(),
        json.dumps({**asdict(SIGN), "rank": None}).encode(),
    ],
)
def test_what_is_no_sign_is_passed_over(tmp_path: Path, content: bytes) -> None:
    SIGN.write(tmp_path)
    heartbeat_path(tmp_path, 1).write_bytes(content)
    heartbeat_path(tmp_path, 2).mkdir()
    assert read_heartbeats(tmp_path) == {0: SIGN}
