import json
from dataclasses import asdict
from pathlib import Path

import pytest

from hypermoe_ds.resilience.heartbeat import Heartbeat, heartbeat_path, read_heartbeats

HEARTBEAT = Heartbeat(0, "here", 7, 3, "waiting", passed=2, beats=5, began=1.5)


def test_a_written_heartbeat_is_read_back(tmp_path: Path) -> None:
    HEARTBEAT.write(tmp_path)
    assert read_heartbeats(tmp_path) == {0: HEARTBEAT}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"3",
        200_000 * b"[",
        b"{}",
        json.dumps({**asdict(HEARTBEAT), "process": "7"}).encode(),
        json.dumps({**asdict(HEARTBEAT), "rank": None}).encode(),
    ],
)
def test_damaged_heartbeats_are_ignored(tmp_path: Path, content: bytes) -> None:
    HEARTBEAT.write(tmp_path)
    heartbeat_path(tmp_path, 1).write_bytes(content)
    heartbeat_path(tmp_path, 2).mkdir()
    assert read_heartbeats(tmp_path) == {0: HEARTBEAT}
