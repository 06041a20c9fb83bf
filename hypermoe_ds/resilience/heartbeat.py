"""Write and read the heartbeat files in RUN_DIR/watch, which the ranks and the supervisor check."""

import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from hypermoe_ds.files import write_atomically

FAILURE_REPORT = "verdict"  # file in RUN_DIR/watch whose only line names the lost rank


@dataclass(frozen=True)
class Heartbeat:
    """State of a rank, which the rank writes to a file every few seconds.

    Attributes:
        rank: the rank.
        host: name of the rank's host.
        process: process id on that host.
        step: the current optimizer step.
        doing: the current part of the step.
        passed: number of parts begun in all steps so far; 0 before the first step. The number is equal on ranks at the
            same position.
        beats: number of heartbeats written.
        end: how the rank ended: done, saved (after a signal), lost (another rank was lost) or error; empty while the
            rank runs.
        error: the error, if `end` is "error".
        began: start time of the process, seconds since the epoch.
    """

    rank: int
    host: str
    process: int
    step: int
    doing: str
    passed: int
    beats: int
    end: str = ""
    error: str = ""
    began: float = 0.0

    def describe(self) -> str:
        """Format the rank with its process and host."""
        return f"rank {self.rank} (process {self.process} on {self.host})"

    def position(self) -> str:
        """Format the step and its current part."""
        return f"step {self.step}, {self.doing}"

    def has_failed(self) -> bool:
        """Return whether the rank reported an error or, if it runs on this host, whether its process has died."""
        if self.end or self.host != socket.gethostname():
            return self.end == "error"
        try:
            return bool(psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def write(self, folder: Path) -> None:
        """Replace this rank's last heartbeat. A full disk is ignored, because checkpointing reports it."""
        with suppress(OSError):
            write_atomically(heartbeat_path(folder, self.rank), json.dumps(asdict(self)))


_HEARTBEAT = TypeAdapter(Heartbeat)


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank."""
    return folder / f"rank_{rank:05d}.json"


def read_heartbeats(folder: Path) -> dict[int, Heartbeat]:
    """Return the heartbeats in RUN_DIR/watch by rank."""
    heartbeats = map(read_heartbeat, sorted(folder.glob("rank_*.json")))
    return {heartbeat.rank: heartbeat for heartbeat in heartbeats if heartbeat is not None}


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Return the heartbeat in a file, or None if the file is missing or damaged."""
    with suppress(OSError, ValueError):
        return _HEARTBEAT.validate_json(path.read_bytes(), strict=True)
    return None
