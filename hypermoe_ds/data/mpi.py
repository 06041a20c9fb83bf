"""Tokenise under mpirun: each rank tokenises a share of the files, and rank 0 joins the parts in input order."""

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
from hypermoe_ds.files import scratch_folder, writing_to

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
    """Tokenise on all ranks if mpirun started more than one, otherwise in this process.

    Returns:
        A one-line summary on rank 0, None on all other ranks.

    Raises:
        UserError: see `preprocess`; also raised if mpi4py is missing or uses another MPI than mpirun.
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
        problem = f"finds {MPI.COMM_WORLD.Get_size()} of the {ranks} ranks of mpirun"
        raise UserError("mpi4py", problem, "use mpirun and the MPI library of mpi4py from the same MPI installation")
    try:
        return preprocess_on_ranks(job, cast(Communicator, MPI.COMM_WORLD))
    except (UserError, SystemExit):
        raise
    except BaseException:  # otherwise the other ranks would wait for this rank forever
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)
        raise


def preprocess_on_ranks(job: Job, comm: Communicator) -> str | None:
    """Tokenise the inputs on all ranks and write the same files as a single process would write.

    All ranks must share the output folder.

    Returns:
        A one-line summary on rank 0, None on all other ranks.

    Raises:
        UserError: a rank failed. Rank 0 raises the error of the lowest failed rank.
        SystemExit: a rank failed. All ranks except rank 0 raise SystemExit.
    """
    rank = comm.Get_rank()
    files = _together(comm, lambda: _check(job))
    with ExitStack() as stack:
        made = _together(comm, lambda: stack.enter_context(scratch_folder(job.path(".bin"))) if rank == 0 else None)
        scratch = Path(str(comm.bcast(made)))
        tokenizer_file = _together(comm, lambda: TokenizerFile.of(job.tokenizer))
        _together(comm, tokenizer_file.encoder)  # loading takes seconds and is excluded from the speed
        start = time.perf_counter()
        share = share_of(files, [path.stat().st_size for path in files], rank, comm.Get_size())
        part = _together(
            comm, lambda: write_tokens(job, share, tokenizer_file, _part(scratch, rank), progress=rank == 0)
        )
        parts = comm.allgather(part)
        written = _together(comm, lambda: _join(job, tokenizer_file, scratch, parts) if rank == 0 else None)
    return written.summary(job.output, time.perf_counter() - start) if written is not None else None


def _check(job: Job) -> list[Path]:
    if job.workers != 1:
        raise UserError(f"workers={job.workers}", "under mpirun each rank is one worker", "remove --workers")
    return check_job(job)


def share_of(files: Sequence[Path], sizes: Sequence[int], rank: int, ranks: int) -> list[Path]:
    """Return the files of a rank: consecutive input files with about 1/`ranks` of all bytes.

    Args:
        files: all files.
        sizes: size of each file in bytes.
        rank: the rank.
        ranks: number of ranks.
    """
    total = sum(sizes) + len(sizes)  # add one byte per file, in case all files are empty
    share, before = [], 0
    for path, size in zip(files, sizes, strict=True):
        middle = before + (size + 1) / 2
        if int(middle * ranks / total) == rank:
            share.append(path)
        before += size + 1
    return share


def _part(scratch: Path, rank: int) -> Path:
    return scratch / f"part-{rank:05d}"


def _join(job: Job, tokenizer_file: TokenizerFile, scratch: Path, parts: Sequence[Written]) -> Written:
    """Join the parts of all ranks and publish the result."""
    from hypermoe_ds.data.megatron import IndexedDatasetBuilder  # noqa: PLC0415 (the import takes seconds)

    written = Written()
    with writing_to(job.path(".bin")):
        builder = IndexedDatasetBuilder(str(scratch / "tokens.bin"), dtype=tokenizer_file.encoder().dtype)
        with builder.data_file:
            for rank, part in enumerate(parts):
                written.tokens += part.tokens
                written.report.add(part.report)
                if part.tokens:
                    builder.add_index(str(_part(scratch, rank)))
            builder.finalize(str(scratch / "tokens.idx"))
    publish(job, tokenizer_file, written, scratch / "tokens")
    return written


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
