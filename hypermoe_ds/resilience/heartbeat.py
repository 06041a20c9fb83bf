"""Signs of life that the ranks write into RUN_DIR/watch, for each other and for who supervises them."""

import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from hypermoe_ds.files import write_whole

FAILURE_REPORT = "verdict"  # beside the signs: which rank was lost, in one line


@dataclass(frozen=True)
class Heartbeat:
    """What a rank writes.

    Attributes:
        rank: whose it is.
        host: where it runs.
        process: its process id there.
        step: step that it works on.
        doing: at what.
        passed: how many things it has begun, 0 before its first step; alike on ranks that stand at the same
            place.
        beats: counts up as long as the process runs.
        end: how it ended: done, saved (a signal asked for it), lost (another rank was), error; empty while it runs.
        error: of the end `error`, what it was.
        began: when its process did, seconds since the epoch.
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
        """Rank, process and host."""
        return f"rank {self.rank} (process {self.process} on {self.host})"

    def position(self) -> str:
        """Step and what is done in it."""
        return f"step {self.step}, {self.doing}"

    def has_failed(self) -> bool:
        """Whether it failed, or its process has ended without a word; of another host that cannot be seen."""
        if self.end or self.host != socket.gethostname():
            return self.end == "error"
        try:
            return bool(psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def write(self, folder: Path) -> None:
        """Replace this rank's last sign. A full disk is for the checkpoints to tell."""
        with suppress(OSError):
            write_whole(heartbeat_path(folder, self.rank), json.dumps(asdict(self)))


_HEARTBEAT = TypeAdapter(Heartbeat)


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Where a rank's sign of life lies."""
    return folder / f"rank_{rank:05d}.json"


def read_heartbeats(folder: Path) -> dict[int, Heartbeat]:
    """The signs of life in RUN_DIR/watch, by rank."""
    heartbeats = map(read_heartbeat, sorted(folder.glob("rank_*.json")))
    return {heartbeat.rank: heartbeat for heartbeat in heartbeats if heartbeat is not None}


def read_heartbeat(path: Path) -> Heartbeat | None:
    """One of them; None where it cannot be read."""
    with suppress(OSError, ValueError):
        return _HEARTBEAT.validate_json(path.read_bytes(), strict=True)
    return None
