"""Code that ranks run in the watchdog tests: each step is one collective operation, until a rank is lost."""

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
    """Yield batches forever; on the lost rank, fail as `kind` specifies after the last good step."""
    for step in range(1, 10**9):
        if step > LAST_GOOD and lost and kind == "hangs":
            time.sleep(10**6)
        yield torch.ones(1)


def lose(folder: Path, kind: str, lost: int) -> None:
    """Train until one rank is killed, is stopped, hangs while loading data, fails or ends early."""
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


def train_to_the_end(folder: Path) -> int:
    """Train for longer than the timeout, in steps that are shorter than the timeout. Return the rank's number."""
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
    """Let one rank start training only after twice the timeout."""
    rank = torch.distributed.get_rank()
    watchdog = Watchdog(folder, rank, torch.distributed.get_world_size(), TIMEOUT)
    with watchdog.watching():
        time.sleep(2 * TIMEOUT * rank)
        torch.distributed.barrier()
        watchdog.begin(1, "beginning")
        watchdog.note_end(saved=False)
    return rank


def lose_before_training(folder: Path, kind: str) -> None:
    """Let rank 1 die or stop before it trains, while the others wait for it."""
    rank = torch.distributed.get_rank()
    watchdog = Watchdog(folder, rank, torch.distributed.get_world_size(), TIMEOUT)
    with watchdog.watching():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        torch.distributed.barrier()


def block_all_ranks(folder: Path, consoles: Path, hosts: list[str]) -> None:
    """Block all ranks in the same part of a step, as if on the given hosts. Each rank prints to its own file."""
    rank = torch.distributed.get_rank()
    socket.gethostname = lambda: hosts[rank]
    sys.stderr = (consoles / str(rank)).open("w")
    watchdog = Watchdog(folder, rank, torch.distributed.get_world_size(), TIMEOUT)
    with watchdog.watching():
        watchdog.begin(1, "forward and backward")
        time.sleep(10**6)
