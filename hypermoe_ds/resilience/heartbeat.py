"""Signs of life that the ranks write into RUN_DIR/watch, for each other and for who supervises them."""

import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from hypermoe_ds.files import write_whole

VERDICT = "verdict"  # beside the signs: which rank was lost, in one line


@dataclass(frozen=True)
class SignOfLife:
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

    def who(self) -> str:
        """Rank, process and host."""
        return f"rank {self.rank} (process {self.process} on {self.host})"

    def place(self) -> str:
        """Step and what is done in it."""
        return f"step {self.step}, {self.doing}"

    def is_gone(self) -> bool:
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
            write_whole(sign_path(folder, self.rank), json.dumps(asdict(self)))


_SIGN = TypeAdapter(SignOfLife)


def sign_path(folder: Path, rank: int) -> Path:
    """Where a rank's sign of life lies."""
    return folder / f"rank_{rank:05d}.json"


def read_signs(folder: Path) -> dict[int, SignOfLife]:
    """The signs of life in RUN_DIR/watch, by rank."""
    signs = map(read_sign, sorted(folder.glob("rank_*.json")))
    return {sign.rank: sign for sign in signs if sign is not None}


def read_sign(path: Path) -> SignOfLife | None:
    """One of them; None where it cannot be read."""
    with suppress(OSError, ValueError):
        return _SIGN.validate_json(path.read_bytes(), strict=True)
    return None
