"""Tokenise under mpirun: each rank writes a share of the shards, and rank 0 joins them in input order."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol, TypeVar, cast

from hypermoe_ds.data.preprocess import Job, Plan, finish, make_plan, preprocess, shown_progress, summary, tokenise
from hypermoe_ds.data.shard_folder import ShardFolder, shard_folder
from hypermoe_ds.errors import UserError

Result = TypeVar("Result")

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH and its derivatives
_FAILED = 2  # the exit code of a UserError


class Communicator(Protocol):
    """The methods of `mpi4py.MPI.Comm` that this module uses."""

    def Get_rank(self) -> int:  # noqa: N802
        """Return the rank of this process."""

    def Get_size(self) -> int:  # noqa: N802
        """Return the number of processes."""

    def allgather(self, sendobj: Result) -> list[Result]:
        """Return the objects of all ranks, in rank order."""

    def bcast(self, obj: Result) -> Result:
        """Return the object of rank 0."""


def preprocess_locally_or_with_mpi(job: Job) -> str | None:
    """Tokenise on all ranks if mpirun started several ranks, and otherwise in this process.

    Returns:
        A one-line summary on rank 0, None on all other ranks.

    Raises:
        UserError: see `preprocess`; also raised if mpi4py is missing or uses a different MPI from mpirun.
    """
    ranks = max(int(os.environ.get(name, "1")) for name in _SIZE_VARIABLES)
    if ranks == 1:
        return preprocess(job)
    try:
        from mpi4py import MPI  # noqa: PLC0415 (an optional dependency that initialises MPI on import)
    except (ImportError, RuntimeError) as error:
        raise UserError("mpi4py", f"is needed under mpirun ({error})", "pip install 'hypermoe-ds[mpi]'") from None
    if MPI.COMM_WORLD.Get_size() != ranks:
        # Without this check, each rank would process all files and overwrite the output of all other ranks.
        problem = f"finds {MPI.COMM_WORLD.Get_size()} of the {ranks} ranks that mpirun started"
        raise UserError("mpi4py", problem, "use mpirun and the MPI library of mpi4py from the same MPI installation")
    try:
        return preprocess_on_ranks(job, cast(Communicator, MPI.COMM_WORLD))
    except (UserError, SystemExit):
        raise
    except BaseException:  # without Abort, the other ranks would wait for this rank forever
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)
        raise


def preprocess_on_ranks(job: Job, comm: Communicator) -> str | None:
    """Tokenise the inputs on all ranks and write the same files that a single process would write.

    All ranks must share the output folder. An interrupted job can continue with a different number of ranks.

    Returns:
        A one-line summary on rank 0, None on all other ranks.

    Raises:
        UserError: a rank failed. Rank 0 raises the error of the lowest failed rank.
        SystemExit: a rank failed. All ranks except rank 0 raise SystemExit.
    """
    rank = comm.Get_rank()
    plan = _together(comm, lambda: _plan(job))
    with ExitStack() as stack:

        def open_folder() -> tuple[ShardFolder, str]:
            return stack.enter_context(shard_folder(job.output, plan.description(), len(plan.shards)))

        opened = _together(comm, lambda: open_folder() if rank == 0 else None)
        folder, message = comm.bcast(opened) or (None, "")
        assert folder is not None
        numbers = comm.bcast(folder.unfinished())[rank :: comm.Get_size()]
        check = _together(comm, lambda: plan.check_tokenizer(folder, folder.unfinished()) if rank == 0 else None)
        messages = [message, check.describe_loss()] if check is not None else []
        start = time.perf_counter()
        _together(comm, lambda: _tokenise(plan, folder, numbers, messages, shown=rank == 0))
        written = _together(comm, lambda: finish(plan, folder) if rank == 0 else None)
    return summary(job, written, time.perf_counter() - start) if written is not None else None


def _plan(job: Job) -> Plan:
    if job.workers != 1:
        raise UserError(f"workers={job.workers}", "each rank of mpirun is one worker", "remove --workers")
    return make_plan(job)


def _tokenise(plan: Plan, folder: ShardFolder, numbers: list[int], messages: list[str], shown: bool) -> None:
    """Write the shards of this rank, and show the progress if `shown` is set."""
    with shown_progress(plan, numbers, messages, shown) as meter:
        tokenise(plan, folder, numbers, meter)


def _together(comm: Communicator, work: Callable[[], Result]) -> Result:
    """Run `work` on every rank. If any rank fails, rank 0 raises the error and all other ranks exit."""
    error: UserError | None = None
    try:
        result = work()
    except UserError as failure:
        error = failure
    errors = [failure for failure in comm.allgather(error) if failure is not None]
    if not errors:
        return result
    if comm.Get_rank() == 0:
        raise errors[0]
    sys.exit(_FAILED)
