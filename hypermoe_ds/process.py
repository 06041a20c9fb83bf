"""Rank, signals and one-line errors of this process."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hypermoe_ds.errors import EXIT_BAD_INPUT, EXIT_FAULT, MachineError, UserError, print_error, shortened

_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
)  # after one of these, a rank finishes its step
_SILENT_SECONDS = 30
_CRASH_SECONDS = 3  # short, because other ranks wait for this rank if only it has an unexpected error


def local_rank() -> int:
    """Return the local rank that the launcher set in the environment; 0 without a launcher."""
    return _from_environment(("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"))


def global_rank() -> int:
    """Return the rank that the launcher set in the environment; 0 without a launcher."""
    return _from_environment(("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"))


def _from_environment(names: Sequence[str]) -> int:
    """Return the first variable that is set (deepspeed and torchrun, Open MPI, srun, MPICH); 0 if none is."""
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def export_rank_variables() -> None:
    """Copy the rank variables of mpirun and srun to those of deepspeed and torchrun, unless these are set."""
    sources = {
        "RANK": ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID"),
        "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"),
        "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"),
    }
    for name, alternatives in sources.items():
        value = next((os.environ[key] for key in alternatives if key in os.environ), None)
        if value is not None:
            os.environ.setdefault(name, value)


def signal_when_parent_ends(number: signal.Signals) -> None:
    """Ask the system to send this process a signal when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _wait_for_local_rank_zero(seconds: float) -> None:
    """Wait until the launcher ends this rank, so that each host prints only one line.

    If this rank exited first, the launcher would kill local rank 0 before it printed the error. If no
    signal arrives in that time, only this rank has the error, and it prints the error itself.
    """
    if local_rank() != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.sigtimedwait([], seconds)


@contextmanager
def one_line_errors(err: TextIO | None = None, log: Path | None = None) -> Iterator[None]:
    """Turn a `UserError` or `MachineError` into one line and exit code 2 or 76, without a traceback.

    Args:
        err: stream for the line; None selects stderr.
        log: file that stderr is redirected to. The traceback of any other exception is then written there, and one
            line on `err` names the exception and the file (exit code 1). If None, other exceptions propagate.
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
        what = f"{type(error).__name__}: {shortened(str(error))}" if str(error) else type(error).__name__
        print_error(f"rank {global_rank()}: {what}; the traceback is at the end of {log}", err)
        sys.exit(1)
