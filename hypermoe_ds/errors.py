"""The one kind of error a user is meant to see: a line that says where, what and how to mend it."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_BAD_INPUT = 2  # what argparse uses for bad usage
EXIT_SAVED = 75  # EX_TEMPFAIL: a signal ended the run after a checkpoint; the same command goes on
EXIT_FAULT = 76  # a rank died or hung, or memory went wrong: the same command goes on from the last checkpoint
_SILENT_SECONDS = 30
_LONGEST_PART = 1500  # characters; the longest part of our own is a list of 60 settings


class UserError(Exception):
    """Bad input from the user, told in one line.

    Args:
        where: the key or file at fault, with its value, e.g. ``parallel.expert=3``.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__(where, problem, remedy)  # its arguments, so that it can be sent to other ranks

    def __str__(self) -> str:
        where, problem, remedy = (_shortened(part) for part in self.args)
        return f"{where}: {problem}; {remedy}"


def _shortened(text: str) -> str:
    """The first 1,500 characters of a part of a message, and how many it has: values may be megabytes."""
    return text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]}... ({len(text):,} characters)"


class MachineError(Exception):
    """What went wrong with a machine or a rank, told in one line; the last checkpoint is as good as it was."""


def local_rank() -> int:
    """This process's number among the ranks of its host, as its launcher tells it; 0 without a launcher."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")  # deepspeed and torchrun, mpirun, srun
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def _leave_the_word_to_local_rank_zero() -> None:
    """Wait until the launcher ends this rank, so that one host prints one line.

    A rank that ended first would have the launcher end local rank 0 before it has spoken. If
    nobody ends this rank within 30 s the fault is its own, and it speaks for itself.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.sigtimedwait([], _SILENT_SECONDS)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError` or `MachineError` into one line on stderr and exit code 2 or 76, without a traceback."""
    try:
        yield
    except (UserError, MachineError) as error:
        if local_rank() != 0:
            _leave_the_word_to_local_rank_zero()
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAULT)
