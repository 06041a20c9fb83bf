"""The one kind of error a user is meant to see: a line that says where, what and how to mend it."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

EXIT_BAD_INPUT = 2  # what argparse uses for bad usage
EXIT_SAVED = 75  # EX_TEMPFAIL: a signal ended the run after a checkpoint; the same command goes on
EXIT_FAULT = 76  # a rank died or hung, or memory went wrong: the same command goes on from the last checkpoint
_SILENT_SECONDS = 30
_CRASH_SECONDS = 3  # an unexpected error may be this rank's alone, and the others then wait for it
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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `MachineError` that names the file; `path` if the error names none."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{error.filename or path}: cannot be written ({error.strerror})") from None


def local_rank() -> int:
    """This process's number among the ranks of its host, as its launcher tells it; 0 without a launcher."""
    return _from_environment(("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"))


def global_rank() -> int:
    """Return this process's rank as its launcher sets it in the environment; 0 without a launcher."""
    return _from_environment(("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"))


def _from_environment(names: Sequence[str]) -> int:
    """Return the first of these variables: deepspeed and torchrun, Open MPI, srun, MPICH."""
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def _wait_for_local_rank_zero(seconds: float) -> None:
    """Wait until the launcher ends this rank, so that one host prints one line.

    If this rank exited first, the launcher would kill local rank 0 before it printed the error. If nobody ends this
    rank in that time the error is its own, and it prints it.
    """
    if local_rank() != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.sigtimedwait([], seconds)


@contextmanager
def one_line_errors(err: TextIO | None = None, log: Path | None = None) -> Iterator[None]:
    """Turn a `UserError` or `MachineError` into one line and exit code 2 or 76, without a traceback.

    Args:
        err: where the line is printed; None takes stderr.
        log: file that stderr is redirected to. The traceback of any other exception is then written there, and one
            line on `err` names the exception and the file (exit code 1). None leaves other exceptions alone.
    """
    try:
        yield
    except (UserError, MachineError) as error:
        _wait_for_local_rank_zero(_SILENT_SECONDS)
        print_error(str(error), err)
        sys.exit(EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAULT)
    except (Exception, KeyboardInterrupt) as error:
        if log is None:
            raise
        traceback.print_exc()
        _wait_for_local_rank_zero(_CRASH_SECONDS)
        what = f"{type(error).__name__}: {_shortened(str(error))}" if str(error) else type(error).__name__
        print_error(f"rank {global_rank()}: {what}; the traceback is at the end of {log}", err)
        sys.exit(1)


def print_error(message: str, err: TextIO | None = None) -> None:
    """Print an error as one line on `err`, or stderr; on a terminal in the place of a status line."""
    stream = err or sys.stderr
    over_status = "\r\x1b[K" if stream.isatty() else ""
    print(f"{over_status}error: {' '.join(message.split())}", file=stream, flush=True)
