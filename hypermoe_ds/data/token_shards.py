"""Tokenise inputs shard by shard. Each shard has its own files, so a restarted job keeps the finished shards."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from hypermoe_ds.data.encoding import Encoder, Tokens
from hypermoe_ds.data.inputs import InputFile, Kind
from hypermoe_ds.data.readers import (
    Document,
    DocumentReader,
    LongText,
    LostDocumentError,
    Problem,
    ReadOptions,
    ReadReport,
    Rejection,
    utf8_bytes,
)
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import write_durably, writing_to

_SMALLEST_SHARD, _USUAL_SHARD = 1 << 20, 64 << 20  # bytes; tokenising 64 MiB takes about 10 s
_SHARDS = 64  # number of shards of a small job; with many shards, all processes finish at about the same time
_MOST_SHARDS = 10_000
_LONGEST_DOCUMENT = 2**31 - 1  # tokens; Megatron's index stores lengths as int32


@dataclass(frozen=True)
class Span:
    """The lines of an input file that begin at a byte offset in [first, end), or a whole file."""

    file: InputFile
    first: int
    end: int

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.first

    @property
    def is_part(self) -> bool:
        """Whether the span is only a part of its file."""
        return self.size < self.file.size


def plan_shards(files: Sequence[InputFile]) -> list[list[Span]]:
    """Divide the inputs into shards of consecutive spans with similar sizes.

    Only uncompressed JSON Lines files are divided; every other file is in one shard. The shards depend only on the
    files.
    """
    total = sum(file.size for file in files)
    size = max(min(max(total // _SHARDS, _SMALLEST_SHARD), _USUAL_SHARD), total // _MOST_SHARDS)
    shards: list[list[Span]] = [[]]
    for file in files:
        for span in _spans(file, size):
            if sum(each.size for each in shards[-1]) + span.size / 2 > size and shards[-1]:
                shards.append([])
            shards[-1].append(span)
    return shards


def _spans(file: InputFile, size: int) -> Iterator[Span]:
    if file.kind is not Kind.JSON_LINES or file.compression or file.size <= size:
        yield Span(file, 0, file.size)
        return
    for first in range(0, file.size, size):
        yield Span(file, first, min(first + size, file.size))


@dataclass
class ShardSummary:
    """Summary of a finished shard.

    Attributes:
        tokens: number of tokens, including end-of-document tokens.
        unknown: number of unknown tokens.
        report: counts of documents and rejections.
        sha256: SHA-256 of each input file whose first byte is in the shard, by path.
    """

    tokens: int = 0
    unknown: int = 0
    report: ReadReport = field(default_factory=ReadReport)
    sha256: dict[str, str] = field(default_factory=dict)

    def add(self, later: "ShardSummary") -> None:
        """Merge the summary of a later shard into this summary."""
        self.tokens += later.tokens
        self.unknown += later.unknown
        self.report.add(later.report)
        self.sha256 |= later.sha256

    def save(self, path: Path) -> None:
        """Write the summary as JSON; the file marks the shard as finished."""
        write_durably(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "ShardSummary | None":
        """Read a summary; return None if the shard is not finished."""
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        report = values.pop("report")
        rejected = {Problem(reason): count for reason, count in report["rejected"].items()}
        first = {Problem(reason): location for reason, location in report["first"].items()}
        return cls(**values, report=ReadReport(report["documents"], report["text_bytes"], rejected, first))


@dataclass(frozen=True)
class ShardFiles:
    """Files of a shard: token ids, document lengths, rejections, and the summary, which is written last."""

    folder: Path
    number: int

    def path(self, suffix: str) -> Path:
        """Return the path of the file with a suffix: `.bin`, `.lengths`, `.rejected.jsonl` or `.json`."""
        return self.folder / f"shard-{self.number:06d}{suffix}"

    def summary(self) -> ShardSummary | None:
        """Return the summary, or None if the shard is not finished."""
        return ShardSummary.load(self.path(".json"))


def write_shard(
    spans: Sequence[Span],
    files: ShardFiles,
    encoder: Encoder,
    options: ReadOptions,
    progress: Callable[[int, int], None],
) -> ShardSummary:
    """Tokenise a shard and write its files.

    Args:
        spans: the inputs of the shard.
        files: the files to write.
        encoder: encoder for the documents.
        options: how documents are read.
        progress: function that is called with the numbers of input bytes and tokens since the previous call.

    Raises:
        UserError: an input changed after the job started, the disk is full or, with `options.strict`, an input is
            rejected.
    """
    with (
        writing_to(files.path(".bin")),
        files.path(".bin").open("wb") as tokens,
        files.path(".lengths").open("wb") as lengths,
        files.path(".rejected.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        writer = _ShardWriter(encoder, options, tokens, lengths, rejected)
        for span in spans:
            writer.write(span, progress)
        for stream in (tokens, lengths, rejected):
            stream.flush()
            os.fsync(stream.fileno())
        writer.summary.save(files.path(".json"))
    return writer.summary


class _ShardWriter:
    """Write the documents of spans to the open files of a shard."""

    def __init__(
        self, encoder: Encoder, options: ReadOptions, tokens: BinaryIO, lengths: BinaryIO, rejected: TextIO
    ) -> None:
        self._encoder, self._options = encoder, options
        self._tokens, self._lengths, self._rejected = tokens, lengths, rejected
        self._length = self._unknown = 0  # numbers of tokens and unknown tokens in the current document
        self.summary = ShardSummary()

    def write(self, span: Span, progress: Callable[[int, int], None]) -> None:
        """Tokenise a span, or reject its file if the file has disappeared."""
        path = span.file.path
        try:
            status = path.stat()
            if (status.st_size, status.st_mtime_ns) != (span.file.size, span.file.modified_ns):
                raise UserError(str(path), "changed while the job was running", "start the job again")
            if span.first == 0:
                with path.open("rb") as stream:
                    self.summary.sha256[str(path)] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            if self._options.strict:
                raise UserError(str(path), f"cannot be read ({error.strerror})", "check the file") from None
            self._reject(Rejection(str(path), None, Problem.UNREADABLE))
            return
        reader = DocumentReader(
            span.file, self._options, self._reject, (span.first, span.end) if span.is_part else None
        )
        try:
            self._write_documents(reader, span, progress)
        except LostDocumentError as error:
            if self._options.strict:
                raise UserError(str(path), f"can no longer be read ({error})", "check the file and its disk") from None
            self._drop(error.document)
            self._reject(Rejection(str(path), None, Problem.UNREADABLE))

    def _write_documents(self, reader: DocumentReader, span: Span, progress: Callable[[int, int], None]) -> None:
        read, tokens = 0, self.summary.tokens
        for ids, is_last in self._encoder.encode(self._counted(reader)):
            self._append(ids)
            if is_last:
                self._end_document(span.file.path)
            position = min(reader.position, span.size)
            progress(position - read, self.summary.tokens - tokens)
            read, tokens = position, self.summary.tokens
        progress(span.size - read, 0)

    def _counted(self, documents: DocumentReader) -> Iterator[Document]:
        report = self.summary.report
        for document in documents:
            report.documents += 1
            report.text_bytes += document.text_bytes if isinstance(document, LongText) else utf8_bytes(document)
            yield document

    def _append(self, ids: Tokens) -> None:
        self._tokens.write(ids.tobytes())
        self._length += len(ids)
        self.summary.tokens += len(ids)
        if self._encoder.unk_id is not None:
            self._unknown += int(np.count_nonzero(ids == self._encoder.unk_id))

    def _end_document(self, path: Path) -> None:
        if self._length > _LONGEST_DOCUMENT:
            problem = f"is a document of {self._length:,} tokens"
            raise UserError(str(path), problem, "divide it into documents of at most 2,147,483,647 tokens")
        self._lengths.write(np.int32(self._length).tobytes())
        self.summary.unknown += self._unknown
        self._length = self._unknown = 0

    def _drop(self, document: LongText) -> None:
        """Remove the tokens of an incomplete document."""
        self.summary.tokens -= self._length
        self._tokens.seek(self.summary.tokens * np.dtype(self._encoder.dtype).itemsize)
        self._tokens.truncate()
        self.summary.report.documents -= 1
        self.summary.report.text_bytes -= document.text_bytes
        self._length = self._unknown = 0

    def _reject(self, rejection: Rejection) -> None:
        self.summary.report.reject(rejection)
        self._rejected.write(json.dumps(asdict(rejection)) + "\n")
