"""What the ranks do in the tests of the watchdog: steps that are one collective, until one rank is lost."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed

from hypermoe_ds.resilience.watchdog import Watchdog

TIMEOUT = 2.0
LAST_GOOD = 5


def batches(kind: str, lost: bool) -> Iterator[torch.Tensor]:
    """Endless, but for what goes wrong after the last good step."""
    for step in range(1, 10**9):
        if step > LAST_GOOD and lost and kind == "hangs":
            time.sleep(10**6)
        yield torch.ones(1)


def lose(folder: Path, kind: str, lost: int) -> None:
    """Go on until a rank is killed, stopped, hangs for data, fails or ends before the others."""
    rank = torch.distributed.get_rank()
    watchdog = Watchdog(folder, rank, torch.distributed.get_world_size(), TIMEOUT)
    with watchdog.watching():
        for step, batch in enumerate(watchdog.each(batches(kind, rank == lost), "forward and backward"), start=1):
            watchdog.begin(step, "forward and backward")
            if step > LAST_GOOD and rank == lost and kind in ("killed", "stopped"):
                os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
            if step > LAST_GOOD and rank == lost and kind == "fails":
                raise ValueError("no such thing")
            if step > LAST_GOOD and rank == lost and kind == "ends":
                watchdog.note_end(saved=False)
                return
            torch.distributed.all_reduce(batch)


def come_to_an_end(folder: Path) -> int:
    """A few steps that take longer together than the timeout allows one to; how many threads are left."""
    rank = torch.distributed.get_rank()
    watchdog = Watchdog(folder, rank, torch.distributed.get_world_size(), TIMEOUT)
    with watchdog.watching():
        for step in range(1, 6):
            watchdog.begin(step, "slow")
            time.sleep(TIMEOUT / 4)
            torch.distributed.all_reduce(torch.ones(1))
        watchdog.note_end(saved=False)
    return rank


def start_slowly(folder: Path) -> int:
    """A rank takes twice the timeout before it trains."""
    rank = torch.distributed.get_rank()
    watchdog = Watchdog(folder, rank, torch.distributed.get_world_size(), TIMEOUT)
    with watchdog.watching():
        time.sleep(2 * TIMEOUT * rank)
        torch.distributed.barrier()
        watchdog.begin(1, "beginning")
        watchdog.note_end(saved=False)
    return rank


def lose_at_the_start(folder: Path, kind: str) -> None:
    """Rank 1 dies or stops before it trains; the others wait for it."""
    rank = torch.distributed.get_rank()
    watchdog = Watchdog(folder, rank, torch.distributed.get_world_size(), TIMEOUT)
    with watchdog.watching():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        torch.distributed.barrier()


def stand_still(folder: Path, consoles: Path, hosts: list[str]) -> None:
    """All ranks stand in the same place, on these hosts; what each tells goes to a file of its own."""
    rank = torch.distributed.get_rank()
    socket.gethostname = lambda: hosts[rank]
    sys.stderr = (consoles / str(rank)).open("w")
    watchdog = Watchdog(folder, rank, torch.distributed.get_world_size(), TIMEOUT)
    with watchdog.watching():
        watchdog.begin(1, "forward and backward")
        time.sleep(10**6)
