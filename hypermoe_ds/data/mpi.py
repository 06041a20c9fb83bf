"""Tokenising under mpirun: each rank takes a share of the files, rank 0 joins the parts in the order of the inputs."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar, cast

from hypermoe_ds.data.preprocess import Job, TokenizerFile, Written, check_job, preprocess, publish, write_tokens
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import scratch_beside, writing_to

Result = TypeVar("Result")

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH and its kin
_FAILED = 2  # the exit code of a UserError


class Communicator(Protocol):
    """The part of `mpi4py.MPI.Comm` that is used."""

    def Get_rank(self) -> int:  # noqa: N802
        """This process's number."""

    def Get_size(self) -> int:  # noqa: N802
        """The number of processes."""

    def allgather(self, sendobj: Result) -> list[Result]:
        """What every rank sent, in rank order."""

    def bcast(self, obj: Result) -> Result:
        """What rank 0 sent."""


def preprocess_here_or_on_ranks(job: Job) -> str | None:
    """Tokenise on all ranks if mpirun started this process with others, else in this process.

    Returns:
        A line that sums up what was done; None on ranks other than 0.

    Raises:
        UserError: see `preprocess`; mpi4py is missing under mpirun.
    """
    ranks = max(int(os.environ.get(name, "1")) for name in _SIZE_VARIABLES)
    if ranks == 1:
        return preprocess(job)
    try:
        from mpi4py import MPI  # noqa: PLC0415 (an optional extra, which starts MPI when imported)
    except (ImportError, RuntimeError) as error:
        raise UserError("mpi4py", f"is needed under mpirun ({error})", "pip install 'hypermoe-ds[mpi]'") from None
    if MPI.COMM_WORLD.Get_size() != ranks:  # each rank would do all the work, over the others' files
        problem = f"sees {MPI.COMM_WORLD.Get_size()} of the {ranks} ranks of mpirun"
        raise UserError("mpi4py", problem, "make mpirun and the library that mpi4py loads those of one MPI")
    try:
        return preprocess_on_ranks(job, cast(Communicator, MPI.COMM_WORLD))
    except (UserError, SystemExit):
        raise
    except BaseException:  # the other ranks would wait for this one for ever
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)
        raise


def preprocess_on_ranks(job: Job, comm: Communicator) -> str | None:
    """Tokenise the inputs on all ranks; the files are the same as those of one process.

    The folder of the output must be one that all ranks see.

    Returns:
        On rank 0 a line that sums up what was done, else None.

    Raises:
        UserError: on rank 0, the error of the first rank that met one.
        SystemExit: on the other ranks, when any rank met an error.
    """
    rank = comm.Get_rank()
    files = _together(comm, lambda: _check(job))
    with ExitStack() as stack:
        made = _together(comm, lambda: stack.enter_context(scratch_beside(job.path(".bin"))) if rank == 0 else None)
        scratch = Path(str(comm.bcast(made)))
        source = _together(comm, lambda: TokenizerFile.of(job.tokenizer))
        _together(comm, source.encoder)  # loading it takes seconds, which are no part of the speed
        start = time.perf_counter()
        share = share_of(files, [path.stat().st_size for path in files], rank, comm.Get_size())
        part = _together(comm, lambda: write_tokens(job, share, source, _part(scratch, rank), progress=rank == 0))
        parts = comm.allgather(part)
        written = _together(comm, lambda: _join(job, source, scratch, parts) if rank == 0 else None)
    return written.summary(job.output, time.perf_counter() - start) if written is not None else None


def _check(job: Job) -> list[Path]:
    if job.workers != 1:
        raise UserError(f"workers={job.workers}", "under mpirun each rank is the worker", "leave out --workers")
    return check_job(job)


def share_of(files: Sequence[Path], sizes: Sequence[int], rank: int, ranks: int) -> list[Path]:
    """The files of `rank`: a run of neighbours in the order of the inputs, about 1/`ranks` of all bytes.

    Args:
        files: all files.
        sizes: size of each in bytes.
        rank: the rank that asks.
        ranks: number of ranks.
    """
    total = sum(sizes) + len(sizes)  # an empty file counts one byte, so that no share is undefined
    share, before = [], 0
    for path, size in zip(files, sizes, strict=True):
        middle = before + (size + 1) / 2
        if int(middle * ranks / total) == rank:
            share.append(path)
        before += size + 1
    return share


def _part(scratch: Path, rank: int) -> Path:
    return scratch / f"part-{rank:05d}"


def _join(job: Job, source: TokenizerFile, scratch: Path, parts: Sequence[Written]) -> Written:
    """Append the parts of all ranks and publish them as one."""
    from hypermoe_ds.data.megatron import IndexedDatasetBuilder  # noqa: PLC0415 (takes seconds: see Encoder)

    written = Written()
    with writing_to(job.path(".bin")):
        builder = IndexedDatasetBuilder(str(scratch / "tokens.bin"), dtype=source.encoder().dtype)
        with builder.data_file:
            for rank, part in enumerate(parts):
                written.tokens += part.tokens
                written.report.add(part.report)
                if part.tokens:
                    builder.add_index(str(_part(scratch, rank)))
            builder.finalize(str(scratch / "tokens.idx"))
    publish(job, source, written, scratch / "tokens")
    return written


def _together(comm: Communicator, work: Callable[[], Result]) -> Result:
    """Do `work` on every rank; if it fails on one, all stop and rank 0 tells why."""
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
