"""Manage the folder of an unfinished preprocessing job, so that the job can continue after an interruption."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hypermoe_ds.data.token_files import write_index
from hypermoe_ds.data.token_shards import ShardFiles, ShardSummary
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import make_folder, sync_folder, write_durably, writing_to

_COPIED_BYTES = 16 << 20


@dataclass(frozen=True)
class ShardFolder:
    """The folder of an unfinished job, with the job's description, its shards, and the files joined so far.

    Attributes:
        path: the folder.
        shards: number of shards of the job.
    """

    path: Path
    shards: int

    def files(self, number: int) -> ShardFiles:
        """Return the files of a shard."""
        return ShardFiles(self.path, number)

    def unfinished(self) -> list[int]:
        """Return the numbers of the shards that are not finished."""
        return [number for number in range(self.shards) if self.files(number).summary() is None]

    def has_documents(self) -> bool:
        """Return whether a finished shard has a document."""
        summaries = (self.files(number).summary() for number in range(self.shards))
        return any(summary is not None and summary.report.documents for summary in summaries)

    def joined(self, suffix: str) -> Path:
        """Return the path of the joined file with this suffix."""
        return self.path / f"joined{suffix}"

    def join(self, dtype: type[np.int32 | np.uint16]) -> ShardSummary:
        """Join the finished shards, in order, into token files, an index and a list of rejections.

        The tokens of each shard are deleted after they are copied, so the disk holds them only once. An interrupted
        join continues where it stopped.

        Raises:
            UserError: the disk is full.
        """
        total, lengths = ShardSummary(), []
        size = np.dtype(dtype).itemsize
        with writing_to(self.path), self.joined(".bin").open("ab") as target:
            for number in range(self.shards):
                files = self.files(number)
                summary = files.summary()
                assert summary is not None
                if files.path(".bin").exists():
                    target.truncate(total.tokens * size)
                    target.seek(0, os.SEEK_END)
                    with files.path(".bin").open("rb") as source:
                        shutil.copyfileobj(source, target, _COPIED_BYTES)
                    target.flush()
                    os.fsync(target.fileno())
                    files.path(".bin").unlink()
                total.add(summary)
                lengths.append(files.path(".lengths"))
            write_index(self.joined(".idx"), dtype, lengths, total.report.documents)
            with self.joined(".rejected.jsonl").open("wb") as rejected:
                for number in range(self.shards):
                    with self.files(number).path(".rejected.jsonl").open("rb") as source:
                        shutil.copyfileobj(source, rejected)
        return total


@contextmanager
def shard_folder(output: str, job: dict[str, Any], shards: int) -> Iterator[tuple[ShardFolder, str]]:
    """Open and lock a job's folder next to its output, and remove files that a different job left there.

    If the `with` block raises an exception, the folder is kept if a finished shard has a document. Otherwise, the
    folder is removed.

    Args:
        output: prefix of the output files.
        job: description of the job; an unfinished job with an equal description is continued.
        shards: number of shards.

    Yields:
        The folder, and a message to print if an earlier job left files in it.

    Raises:
        UserError: another job is writing the same output, or the folder is not writable.
    """
    path = Path(output).parent / f".{Path(output).name}.partial"
    with writing_to(path):
        made = make_folder(path)
        with (path / "lock").open("w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "wait for that job, or choose another output"
                raise UserError(output, "is being written by another job", remedy) from None
            folder = ShardFolder(path, shards)
            message = _prepare(folder, job)
            try:
                yield folder, message
            except BaseException:
                if not folder.has_documents():
                    shutil.rmtree(made or path)
                raise
        shutil.rmtree(path)


def _prepare(folder: ShardFolder, job: dict[str, Any]) -> str:
    """Keep the existing files if they belong to this job; otherwise, remove them. Return a message for the user."""
    description = folder.path / "job.json"
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
    same = description.exists() and description.read_text() == digest
    others = [each for each in folder.path.iterdir() if each.name != "lock"]
    if same:
        finished = folder.shards - len(folder.unfinished())
        return f"continuing: {finished:,} of {folder.shards:,} shards are finished"
    for each in others:
        each.unlink()
    write_durably(description, digest)
    sync_folder(folder.path)
    return f"removed the unfinished files of a different job from {folder.path}" if others else ""
