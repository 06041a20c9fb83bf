"""Tokenise text into token files. Worker processes tokenise documents; the main process writes them in input order."""

import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from hypermoe_ds.data.encoding import Encoder, Tokens, encode_batch, encoder_for
from hypermoe_ds.data.readers import ReadReport, expand_inputs, read_documents
from hypermoe_ds.data.token_files import Metadata
from hypermoe_ds.data.tokenizer import vocabulary_file
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import scratch_folder, sha256_of, writing_to
from hypermoe_ds.progress import Progress

_SUFFIXES = (".bin", ".json", ".idx")  # in the order in which `publish` moves files: the .idx file is last
_BATCH_DOCUMENTS = 32
_BATCHES_AHEAD = 4  # per worker; limits the amount of text in memory


@dataclass(frozen=True)
class Job:
    """A preprocessing job.

    Attributes:
        inputs: input files and folders; see `readers.expand_inputs`.
        tokenizer: Hugging Face tokenizer folder.
        output: prefix of the files to write; `.bin`, `.idx` and `.json` are appended.
        workers: number of processes that tokenise; 1 uses the current process. The output is the same for any number.
        text_field: JSONL field that contains the text.
        strict: raise an error for inputs without text instead of counting them.
        overwrite: replace existing files at `output`.
    """

    inputs: Sequence[str]
    tokenizer: str
    output: str
    workers: int = 1
    text_field: str = "text"
    strict: bool = False
    overwrite: bool = False

    def path(self, suffix: str) -> Path:
        """Return the output file with `suffix`."""
        return Path(f"{self.output}{suffix}")


@dataclass
class Written:
    """Number of written tokens, including end-of-document tokens, and a report on the inputs."""

    tokens: int = 0
    report: ReadReport = field(default_factory=ReadReport)

    def speed(self, seconds: float) -> str:
        """Return the number of tokens per second as text."""
        return f"{self.tokens / max(seconds, 1e-9):,.0f} tokens/s"

    def summary(self, output: str, seconds: float) -> str:
        """Return a one-line summary of the output, the speed and the skipped inputs."""
        report = self.report
        return (
            f"{output}: {report.documents:,} documents, {self.tokens:,} tokens, {report.text_bytes:,} bytes of text, "
            f"{seconds:.1f} seconds, {self.speed(seconds)}, "
            f"skipped: {report.describe_skipped() or 'nothing'}"
        )


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


def preprocess(job: Job) -> str:
    """Tokenise the inputs and write either all token files or none.

    Returns:
        A one-line summary.

    Raises:
        UserError: an input cannot be read (or, with `strict`, has no text), no document was found, the tokenizer is
            missing, or the output already exists.
    """
    files = check_job(job)
    tokenizer_file = TokenizerFile.of(job.tokenizer)
    tokenizer_file.encoder()  # loading takes seconds and is excluded from the speed
    start = time.perf_counter()
    with scratch_folder(job.path(".bin")) as scratch:
        written = write_tokens(job, files, tokenizer_file, scratch / "tokens", progress=True)
        publish(job, tokenizer_file, written, scratch / "tokens")
    return written.summary(job.output, time.perf_counter() - start)


def check_job(job: Job) -> list[Path]:
    """Check a job before tokenisation starts, and return the files to read.

    Raises:
        UserError: an input or the number of workers is invalid, or the output exists and `overwrite` is not set.
    """
    if job.workers < 1:
        raise UserError(f"workers={job.workers}", "is not a number of processes", "give 1 or more")
    if job.output.endswith("/") or Path(job.output).is_dir():
        raise UserError(job.output, "is a folder", "give a prefix such as data/corpus, to which .bin is appended")
    for suffix in _SUFFIXES:
        if job.path(suffix).exists() and not job.overwrite:
            raise UserError(str(job.path(suffix)), "exists already", "choose another output, or give --overwrite")
    return expand_inputs(job.inputs)


def write_tokens(
    job: Job, files: Sequence[Path], tokenizer_file: TokenizerFile, prefix: Path, progress: bool
) -> Written:
    """Tokenise `files` into `prefix`.bin and `prefix`.idx, with an end-of-sequence token after each document.

    Raises:
        UserError: an input is invalid, or the disk is full.
    """
    from hypermoe_ds.data.megatron import IndexedDatasetBuilder  # noqa: PLC0415 (the import takes seconds)

    written = Written()
    documents = read_documents(files, written.report, job.text_field, job.strict)
    encoder, start = tokenizer_file.encoder(), time.perf_counter()
    shown = Progress("tokenise", "documents", note=lambda: written.speed(time.perf_counter() - start))
    with writing_to(prefix), shown if progress else nullcontext() as bar:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=encoder.dtype)
        with builder.data_file:
            for tokens in _tokenise(documents, tokenizer_file, job.workers):
                builder.add_document(tokens, [len(tokens)])
                written.tokens += len(tokens)
                if bar is not None:
                    bar.update()
            builder.finalize(f"{prefix}.idx")
    return written


def publish(job: Job, tokenizer_file: TokenizerFile, written: Written, prefix: Path) -> None:
    """Write the metadata next to the finished files at `prefix`, and move all files to the output.

    Raises:
        UserError: there is no document, or the output cannot be written.
    """
    written.report.require_documents(job.text_field)
    encoder = tokenizer_file.encoder()
    metadata = Metadata(
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        tokenizer=tokenizer_file.folder,
        tokenizer_file=tokenizer_file.file,
        tokenizer_sha256=tokenizer_file.sha256,
        documents=written.report.documents,
        tokens=written.tokens,
        text_bytes=written.report.text_bytes,
        encoding_sha256=encoder.digest,
    )
    with writing_to(job.path(".bin")):
        metadata.write(Path(f"{prefix}.json"))
        # Remove the old index first, so that an interruption cannot leave a usable mix of old and new files.
        job.path(".idx").unlink(missing_ok=True)
        for suffix in _SUFFIXES:
            Path(f"{prefix}{suffix}").replace(job.path(suffix))


def _tokenise(documents: Iterator[str], tokenizer_file: TokenizerFile, workers: int) -> Iterator[Tokens]:
    """Yield the tokens of each document, in order."""
    encoder = tokenizer_file.encoder()
    if workers == 1:
        yield from map(encoder.encode, documents)
        return
    # Forked workers inherit the loaded tokenizer. Forking is safe, because no thread of this process can hold a lock.
    # The terminal sends Ctrl-C to all processes. Workers ignore the signal, and this process handles it.
    pool = ProcessPoolExecutor(workers, get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        for batch in _in_order(pool, documents, tokenizer_file, workers * _BATCHES_AHEAD):
            yield from batch
    except BrokenProcessPool:
        remedy = "start fewer workers if memory ran out"
        raise UserError(f"workers={workers}", "a worker process died", remedy) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, documents: Iterator[str], tokenizer_file: TokenizerFile, ahead: int
) -> Iterator[list[Tokens]]:
    """Yield the tokens of batches of documents, in order, with at most `ahead` batches in progress."""
    pending: deque[Future[list[Tokens]]] = deque()
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        pending.append(pool.submit(encode_batch, tokenizer_file.folder, tokenizer_file.sha256, batch))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
