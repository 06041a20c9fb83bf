"""Tokenise text into token files, shard by shard, so that an interrupted job can continue."""

import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hypermoe_ds import __version__
from hypermoe_ds.data.encoding import Encoder, encoder_for
from hypermoe_ds.data.inputs import InputFile, Kind, find_inputs
from hypermoe_ds.data.readers import ReadOptions
from hypermoe_ds.data.shard_folder import ShardFolder, shard_folder
from hypermoe_ds.data.token_files import Metadata, content_digest
from hypermoe_ds.data.token_shards import ShardSummary, Span, plan_shards, write_shard
from hypermoe_ds.data.tokenizer import vocabulary_file
from hypermoe_ds.data.tokenizer_check import TokenizerCheck, check_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import check_room, sha256_of, writing_to
from hypermoe_ds.process import signal_when_parent_ends
from hypermoe_ds.progress import Progress
from hypermoe_ds.provenance import git_commit, package_version

_SUFFIXES = (".bin", ".json", ".idx")  # in the order in which files are moved to the output; the .idx file is last
_SECONDS_BETWEEN_UPDATES = 0.2
_PACKAGES = ("hypermoe-ds", "transformers", "tokenizers", "sentencepiece", "pyarrow")  # packages that affect token ids


@dataclass(frozen=True)
class Job:
    """A preprocessing job.

    Attributes:
        inputs: input files and folders; see `inputs.find_inputs`.
        tokenizer: Hugging Face tokenizer folder.
        output: prefix of the files to write; `.bin`, `.idx`, `.json` and `.rejected.jsonl` are appended.
        workers: number of processes that tokenise; with 1, the current process does. It does not affect the output.
        options: how documents are read.
        unknown_as: kind to assume for files with an unknown suffix; with None, such files are an error.
        max_rejected: largest allowed share of rejected files and records, 0 to 1.
        overwrite: whether to replace existing files at `output`.
    """

    inputs: Sequence[str]
    tokenizer: str
    output: str
    workers: int = 1
    options: ReadOptions = field(default_factory=ReadOptions)
    unknown_as: Kind | None = None
    max_rejected: float = 0.01
    overwrite: bool = False

    def path(self, suffix: str) -> Path:
        """Return the path of the output file with this suffix."""
        return Path(f"{self.output}{suffix}")


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer folder, its vocabulary file and the SHA-256 of that file."""

    folder: str
    file: str
    sha256: str

    @classmethod
    def of(cls, folder: str) -> "TokenizerFile":
        """Find the vocabulary file of a tokenizer folder and compute its hash.

        Raises:
            UserError: the folder has no tokenizer.
        """
        path = vocabulary_file(folder)
        return cls(folder, path.name, sha256_of(path))

    def encoder(self) -> Encoder:
        """Return the encoder of the folder, which each process loads once."""
        return encoder_for(self.folder, self.sha256)


@dataclass
class Plan:
    """A checked job.

    Attributes:
        job: the job.
        files: the input files, in order.
        shards: the spans of each shard.
        tokenizer: the tokenizer.
    """

    job: Job
    files: list[InputFile]
    shards: list[list[Span]]
    tokenizer: TokenizerFile

    def description(self) -> dict[str, Any]:
        """Describe everything that affects the content of the shards, as JSON."""
        return {
            "version": __version__,
            "tokenizer": [self.tokenizer.sha256, self.tokenizer.encoder().digest],
            "options": asdict(self.job.options),
            "files": [[str(each.path), each.kind, each.size, each.modified_ns] for each in self.files],
        }

    def check_tokenizer(self, folder: ShardFolder, numbers: Sequence[int]) -> TokenizerCheck:
        """Check the tokenizer on a sample, and check that the disk has room for the tokens of the unfinished shards.

        Raises:
            UserError: there is too little free space.
        """
        encoder = self.tokenizer.encoder()
        check = check_tokenizer(encoder, self.files, self.job.options)
        text_bytes = sum(_text_bytes(span) for number in numbers for span in self.shards[number])
        check_room(self.job.path(".bin"), folder.path, int(text_bytes * check.tokens_per_byte() * encoder.token_bytes))
        return check


def _text_bytes(span: Span) -> int:
    """Estimate the size of a span's text.

    Compressed files and Parquet files are assumed to be half as large as their text.
    """
    compressed = span.file.compression or span.file.kind is Kind.PARQUET
    return span.size * (2 if compressed else 1)


def preprocess(job: Job) -> str:
    """Tokenise the inputs and write either all token files or none.

    After an interruption, the same job continues with the shards that are not finished.

    Returns:
        A one-line summary.

    Raises:
        UserError: an input cannot be read (or, with `strict`, has no text), too many inputs were rejected, no document
            was found, the tokenizer is missing, or the output already exists or is being written by another job.
    """
    plan = make_plan(job)
    start = time.perf_counter()
    with shard_folder(job.output, plan.description(), len(plan.shards)) as (folder, message):
        numbers = folder.unfinished()
        check = plan.check_tokenizer(folder, numbers)
        with shown_progress(plan, numbers, [message, check.describe_loss()]) as meter:
            tokenise(plan, folder, numbers, meter)
        written = finish(plan, folder)
    return summary(job, written, time.perf_counter() - start)


def make_plan(job: Job) -> Plan:
    """Check a job before tokenisation starts, find its inputs and load its tokenizer.

    Raises:
        UserError: an input, the tokenizer or the number of workers is invalid, or the output exists and `overwrite` is
            not set.
    """
    if job.workers < 1:
        raise UserError(f"workers={job.workers}", "is not a number of processes", "give 1 or more")
    if not 0 <= job.max_rejected <= 1:
        raise UserError(f"max_rejected={job.max_rejected:.0%}", "is out of range", "give 0% to 100%")
    if job.output.endswith("/") or Path(job.output).is_dir():
        raise UserError(job.output, "is a folder", "give a prefix such as data/corpus, to which .bin is appended")
    for suffix in _SUFFIXES:
        if job.path(suffix).exists() and not job.overwrite:
            raise UserError(str(job.path(suffix)), "exists already", "choose another output, or give --overwrite")
    files = find_inputs(job.inputs, job.unknown_as)
    tokenizer = TokenizerFile.of(job.tokenizer)
    tokenizer.encoder()  # loaded here, so that the reported speed excludes the seconds that loading takes
    return Plan(job, files, plan_shards(files), tokenizer)


class Counters:
    """The numbers of input bytes and tokens that all workers have processed, in shared memory."""

    def __init__(self) -> None:
        self._values = get_context("fork").Array("q", 2)

    def add(self, read: int, tokens: int) -> None:
        """Add to the two numbers. The workers call this method."""
        with self._values.get_lock():
            self._values[0] += read
            self._values[1] += tokens

    @property
    def read(self) -> int:
        """Number of input bytes that have been read."""
        return int(self._values[0])

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self._values[1])


@dataclass
class Meter:
    """Show the counters of the workers in a progress bar, if there is one."""

    counters: Counters
    bar: Progress | None
    shown: int = 0

    def update(self) -> None:
        """Show the current number of input bytes."""
        if self.bar is not None:
            read = self.counters.read
            self.bar.update(read - self.shown)
            self.shown = read


@contextmanager
def shown_progress(plan: Plan, numbers: Sequence[int], messages: Sequence[str], shown: bool = True) -> Iterator[Meter]:
    """Show the progress of the shards in `numbers`: input bytes, remaining time and tokens."""
    total = sum(span.size for number in numbers for span in plan.shards[number])
    counters, start = Counters(), time.perf_counter()

    def note() -> str:
        speed = counters.tokens / max(time.perf_counter() - start, 1e-9)
        return f"{counters.tokens:,} tokens, {speed:,.0f} tokens/s"

    if not shown:
        yield Meter(counters, None)
        return
    with Progress("tokenise", "B", total, note) as bar:
        for message in filter(None, messages):
            bar.print(message)
        yield Meter(counters, bar)


def tokenise(plan: Plan, folder: ShardFolder, numbers: Sequence[int], meter: Meter) -> None:
    """Write shards, in this process or in `workers` processes.

    Raises:
        UserError: see `write_shard`; also raised if a worker process died.
    """
    workers = min(plan.job.workers, len(numbers))
    if workers <= 1:

        def progress(read: int, tokens: int) -> None:
            meter.counters.add(read, tokens)
            meter.update()

        for number in numbers:
            write_shard(plan.shards[number], folder.files(number), plan.tokenizer.encoder(), plan.job.options, progress)
        return
    _Worker.plan, _Worker.folder, _Worker.counters = plan, folder, meter.counters
    # Forked workers inherit the loaded tokenizer. Forking is safe, because no thread of this process can hold a lock.
    with ProcessPoolExecutor(workers, get_context("fork"), _begin_worker) as pool:
        futures = {pool.submit(_write_shard, number) for number in numbers}
        try:
            while futures:
                done, futures = wait(futures, _SECONDS_BETWEEN_UPDATES)
                meter.update()
                for future in done:
                    future.result()
        except BrokenProcessPool:
            remedy = "start the same command again to continue, with fewer workers if memory ran out"
            raise UserError(f"workers={plan.job.workers}", "a worker process died", remedy) from None
        except BaseException:
            _stop_workers(pool)
            raise


class _Worker:
    """Objects that workers inherit from the process that forks them."""

    plan: Plan
    folder: ShardFolder
    counters: Counters


def _begin_worker() -> None:
    """Make a worker ignore Ctrl-C, which the terminal sends to all processes, and end with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_when_parent_ends(signal.SIGKILL)


def _write_shard(number: int) -> None:
    plan = _Worker.plan
    files, encoder = _Worker.folder.files(number), plan.tokenizer.encoder()
    write_shard(plan.shards[number], files, encoder, plan.job.options, _Worker.counters.add)


def _stop_workers(pool: ProcessPoolExecutor) -> None:
    """Kill the workers; the next job writes their unfinished shards again."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in list((pool._processes or {}).values()):
        process.kill()


def finish(plan: Plan, folder: ShardFolder) -> ShardSummary:
    """Join all shards, check the share of rejections, and move the files to the output.

    Raises:
        UserError: there is no document, too many inputs were rejected, or the output cannot be written.
    """
    job, encoder = plan.job, plan.tokenizer.encoder()
    written = folder.join(encoder.dtype)
    report = written.report
    rejected = sum(report.rejected.values())
    report.require_documents(job.options.text_field)
    with writing_to(job.path(".bin")):
        if rejected:
            folder.joined(".rejected.jsonl").replace(job.path(".rejected.jsonl"))
    if rejected > job.max_rejected * (rejected + report.documents):
        share = rejected / (rejected + report.documents)
        problem = f"{share:.1%} of them were rejected (limit {job.max_rejected:.1%}): {report.describe_rejected()}"
        remedy = f"see {job.path('.rejected.jsonl')}; correct the inputs or raise --max-rejected"
        raise UserError("the inputs", problem, remedy)
    paths = folder.joined(".bin"), folder.joined(".idx")
    with Progress("hash", "B", sum(path.stat().st_size for path in paths)) as bar:
        bin_sha256, idx_sha256 = (sha256_of(path, bar.update) for path in paths)
    metadata = Metadata(
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        tokenizer=plan.tokenizer.folder,
        tokenizer_file=plan.tokenizer.file,
        tokenizer_sha256=plan.tokenizer.sha256,
        documents=report.documents,
        tokens=written.tokens,
        text_bytes=report.text_bytes,
        encoding_sha256=encoder.digest,
        bin_digest=content_digest(folder.joined(".bin")),
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
        inputs=[
            {"path": str(each.path), "bytes": each.size, "digest": _digest_of_input(each.path)} for each in plan.files
        ],
        options={"text_field": job.options.text_field, "document_separator": job.options.separator},
        versions={"git_commit": git_commit(), **{package: package_version(package) for package in _PACKAGES}},
    )
    with writing_to(job.path(".bin")):
        metadata.write(folder.joined(".json"))
        # Remove the old index first, so that an interruption cannot leave a usable mix of old and new files.
        job.path(".idx").unlink(missing_ok=True)
        if not rejected:
            job.path(".rejected.jsonl").unlink(missing_ok=True)
        for suffix in _SUFFIXES:
            folder.joined(suffix).replace(job.path(suffix))
    return written


def _digest_of_input(path: Path) -> str:
    """Return the digest of an input file, or "missing" if the file disappeared during the job."""
    try:
        return content_digest(path)
    except OSError:
        return "missing"


def summary(job: Job, written: ShardSummary, seconds: float) -> str:
    """Return a one-line summary of the output, the speed and the rejections."""
    report = written.report
    unknown = f"{written.unknown:,} unknown tokens, " if written.unknown else ""
    return (
        f"{job.output}: {report.documents:,} documents, {written.tokens:,} tokens, {unknown}"
        f"{report.text_bytes:,} bytes of text, {seconds:.1f} seconds, "
        f"{report.text_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s, "
        f"rejected: {report.describe_rejected() or 'nothing'}"
    )
