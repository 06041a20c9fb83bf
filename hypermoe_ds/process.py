"""Find the rank of a process, set up its signals and print its errors in one line."""

import ctypes
import os
import resource
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
)  # on one of these signals, a rank finishes its step, saves a checkpoint and exits
_SILENT_SECONDS = 30
_OTHER_FILES = 512  # for libraries, token files, checkpoints and data loader processes
_CRASH_SECONDS = 3  # short, because other ranks wait for this rank if only this rank fails


def local_rank() -> int:
    """Return the local rank that the launcher set in the environment; 0 without a launcher."""
    return _from_environment(("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"))


def global_rank() -> int:
    """Return the rank that the launcher set in the environment; 0 without a launcher."""
    return _from_environment(("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"))


def _from_environment(names: Sequence[str]) -> int:
    """Return the value of the first environment variable that is set, or 0 if no variable is set.

    Callers name the variable of deepspeed and torchrun first, then those of Open MPI, srun and MPICH.
    """
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def export_rank_variables() -> None:
    """Copy the rank variables of mpirun or srun to those of deepspeed and torchrun, unless the latter exist already."""
    sources = {
        "RANK": ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID"),
        "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"),
        "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"),
    }
    for name, alternatives in sources.items():
        value = next((os.environ[key] for key in alternatives if key in os.environ), None)
        if value is not None:
            os.environ.setdefault(name, value)


def allow_open_files(ranks: int, gloo_groups: int) -> None:
    """Raise this process's limit on open files to the highest value that the system allows.

    Each gloo process group keeps a connection to every rank, so the usual limit of 1,024 files is too low for a few
    hundred ranks.

    Args:
        ranks: number of ranks of the job.
        gloo_groups: number of gloo process groups that contain all ranks.

    Raises:
        MachineError: the system allows fewer files than the job needs.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = gloo_groups * (ranks + 3) + _OTHER_FILES
    if most != resource.RLIM_INFINITY and most < needed:
        problem = f"{ranks} ranks need {needed} open files per process, but the system allows {most}"
        raise MachineError(f"{problem}: raise the hard limit (ulimit -Hn) on all hosts")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def signal_when_parent_ends(number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent exits for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _wait_for_local_rank_zero(seconds: float) -> None:
    """Wait until the launcher kills this rank, so that only local rank 0 of each host prints the error.

    If this rank exited first, the launcher would kill local rank 0 before local rank 0 printed the error. If the
    launcher does not kill this rank within `seconds`, local rank 0 has no error, and the caller prints this rank's
    error.
    """
    if local_rank() != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.sigtimedwait([], seconds)


@contextmanager
def one_line_errors(err: TextIO | None = None, log: Path | None = None) -> Iterator[None]:
    """Print a `UserError` or `MachineError` as one line without a traceback, and exit with code 2 or 76.

    Args:
        err: stream for the line; None selects stderr.
        log: file that stderr is redirected to. On any other exception, the traceback is written to this file, one line
            on `err` names the exception and the file, and the exit code is 1. If None, other exceptions propagate.
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
