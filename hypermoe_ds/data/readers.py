"""Read the documents of input files. To bound memory, a large text file is read in pieces."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, BinaryIO

from backports import zstd

from hypermoe_ds.data.inputs import InputFile, Kind
from hypermoe_ds.errors import UserError

LONG_BYTES = 8 << 20  # a text file above this size is read in pieces
_PIECE_BYTES = 256 << 10
_LONGEST_LINE = 64 << 20  # bytes; parsing a line takes several times its size in memory
_ARROW_ROWS = 256
_BROKEN = (gzip.BadGzipFile, zstd.ZstdError, lzma.LZMAError, zlib.error, EOFError)
_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".bz2": bz2.BZ2File,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".zst": zstd.ZstdFile,
}


class Problem(StrEnum):
    """Reasons why a file or a record is rejected."""

    EMPTY_FILE = "empty file"
    NOT_UTF8 = "no UTF-8 text"
    BROKEN = "broken data"
    UNREADABLE = "unreadable file"
    NO_JSON = "no JSON object"
    LONG_LINE = "longer than 64 MiB"
    NO_TEXT = "no text in the field"


_REMEDIES = {
    Problem.EMPTY_FILE: "remove the file from the inputs",
    Problem.NOT_UTF8: "convert the file to UTF-8 or remove it from the inputs",
    Problem.BROKEN: "fetch or compress the file again",
    Problem.UNREADABLE: "check the file and its disk",
    Problem.NO_JSON: "correct or remove that line; a file has one JSON object per line",
    Problem.LONG_LINE: "write long documents as text files",
    Problem.NO_TEXT: "set --text-field to the field that contains the text, such as a.b, or remove the record",
}


@dataclass(frozen=True)
class Rejection:
    """A file or a record that was rejected.

    Attributes:
        file: path of the file.
        line: line or row number, counted from 1; None for a whole file.
        reason: why the file or record was rejected.
    """

    file: str
    line: int | None
    reason: Problem

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class ReadReport:
    """Counts of documents and rejections.

    Attributes:
        documents: number of documents read.
        text_bytes: total size of the documents in UTF-8 bytes.
        rejected: number of rejected files and records, by reason.
        first: location of the first rejection for each reason, as `file` or `file:line`.
    """

    documents: int = 0
    text_bytes: int = 0
    rejected: dict[Problem, int] = field(default_factory=dict)
    first: dict[Problem, str] = field(default_factory=dict)

    def reject(self, rejection: Rejection) -> None:
        """Count a rejected file or record."""
        self.rejected[rejection.reason] = self.rejected.get(rejection.reason, 0) + 1
        self.first.setdefault(rejection.reason, str(rejection))

    def add(self, later: "ReadReport") -> None:
        """Merge the report of later inputs into this report."""
        self.documents += later.documents
        self.text_bytes += later.text_bytes
        for reason, count in later.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count
        self.first = later.first | self.first

    def require_documents(self, text_field: str) -> None:
        """Check that at least one document was read.

        Raises:
            UserError: no document was read.
        """
        if self.documents > 0:
            return
        problem = f"contain no document: {self.describe_rejected()}" if self.rejected else "contain no document"
        remedy = "give files with text"
        if Problem.NO_TEXT in self.rejected:
            remedy = f"set --text-field to the field that contains the text (it is '{text_field}' now)"
        raise UserError("the inputs", problem, remedy)

    def describe_rejected(self) -> str:
        """Describe the rejections in one line, or return an empty string if nothing was rejected."""
        return ", ".join(
            f"{count:,} with {problem} (first: {self.first[problem]})" for problem, count in self.rejected.items()
        )


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read from files.

    Attributes:
        text_field: name of the field that contains the text; a dot separates the names of nested fields.
        separator: text between the documents of a text file; None if each text file is one document.
        strict: whether to raise an error instead of rejecting a file or a record.
    """

    text_field: str = "text"
    separator: str | None = None
    strict: bool = False


@dataclass(frozen=True)
class LongText:
    """A document that is too large to be read at once.

    Attributes:
        file: the file, which contains only this document.
        text_bytes: size of the text in UTF-8 bytes.
        progress: function that is called with the number of bytes that have been read from the file.
    """

    file: InputFile
    text_bytes: int
    progress: Callable[[int], None] = lambda _: None

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of about 256 KiB.

        Raises:
            LostDocumentError: the file can no longer be read.
        """
        try:
            for position, piece in positioned_pieces(self.file):
                self.progress(position)
                yield piece
        except (OSError, ValueError, *_BROKEN) as error:
            raise LostDocumentError(self, str(error)) from error


class LostDocumentError(Exception):
    """A long document can no longer be read, although it was readable when it was checked."""

    def __init__(self, document: LongText, reason: str) -> None:
        super().__init__(reason)
        self.document = document


Document = str | LongText


class DocumentReader:
    """Iterate over the documents of a file in order.

    Blank lines of JSON Lines and blank documents between separators are ignored. A byte order mark is removed.

    Args:
        file: the file.
        options: how documents are read.
        report: function that is called with each rejected file or record.
        span: byte range [first, end) of uncompressed JSON Lines; only lines that begin in this range are read.

    Attributes:
        position: number of bytes of the file that have been read, before decompression.
        row: number of rows read from a Parquet or Arrow file.

    Raises:
        UserError: `options.strict` is set and a file or record contains no document.
    """

    def __init__(
        self,
        file: InputFile,
        options: ReadOptions,
        report: Callable[[Rejection], None],
        span: tuple[int, int] | None = None,
    ) -> None:
        self.file, self.options, self._report, self.span = file, options, report, span
        self.position = self.row = 0

    def __iter__(self) -> Iterator[Document]:
        try:
            if self.file.size == 0:
                self.reject(Problem.EMPTY_FILE)
            else:
                yield from _READERS[self.file.kind](self)
        except _BROKEN:
            self.reject(Problem.BROKEN)
        except OSError as error:
            # bz2 and pyarrow report broken data as an OSError without an error number.
            self.reject(Problem.UNREADABLE if error.errno else Problem.BROKEN)

    def move_to(self, position: int) -> None:
        """Set the number of bytes that have been read."""
        self.position = position

    def reject(self, reason: Problem, line: int | None = None) -> None:
        """Report a rejected file or record, or raise a `UserError` if `options.strict` is set."""
        rejection = Rejection(str(self.file.path), line, reason)
        if self.options.strict:
            raise UserError(str(rejection), reason, _REMEDIES[reason])
        self._report(rejection)


@contextmanager
def _open(file: InputFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file. Yield the decompressed stream and the raw stream, whose position shows the progress."""
    with file.path.open("rb") as raw:
        if not file.compression:
            yield raw, raw
            return
        with _DECOMPRESSORS[file.compression](raw) as stream:
            yield stream, raw


def _read_text(reader: DocumentReader) -> Iterator[Document]:
    file, separator = reader.file, reader.options.separator
    try:
        if separator is not None:
            yield from filter(str.strip, _split(_positioned(reader), separator))
            return
        with _open(file) as (stream, _):
            content = stream.read(LONG_BYTES + 1)
        if len(content) <= LONG_BYTES:
            text = content.decode("utf-8-sig")
            document: Document = text
            blank = not text.strip()
        else:
            # Decode the whole file first, so that invalid UTF-8 is found before the first piece is encoded.
            text_bytes, blank = 0, True
            for _, piece in positioned_pieces(file):
                text_bytes += utf8_bytes(piece)
                blank = blank and not piece.strip()
            document = LongText(file, text_bytes, reader.move_to)
    except UnicodeDecodeError:
        reader.reject(Problem.NOT_UTF8)
        return
    if blank:
        reader.reject(Problem.EMPTY_FILE)
    else:
        yield document


def positioned_pieces(file: InputFile) -> Iterator[tuple[int, str]]:
    """Yield the text of a file in pieces, each with the number of bytes that have been read from the file."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _open(file) as (stream, raw):
        while content := stream.read(_PIECE_BYTES):
            yield raw.tell(), decoder.decode(content)
    yield file.size, decoder.decode(b"", final=True)


def utf8_bytes(text: str) -> int:
    """Return the size of a text in UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode())


def _positioned(reader: DocumentReader) -> Iterator[str]:
    for position, piece in positioned_pieces(reader.file):
        reader.move_to(position)
        yield piece


def _split(pieces: Iterable[str], separator: str) -> Iterator[str]:
    """Yield the documents between separators. A separator can begin in one piece and end in the next."""
    parts: list[str] = []
    tail = ""
    for piece in pieces:
        *complete, last = (tail + piece).split(separator)
        for document in complete:
            yield "".join([*parts, document])
            parts = []
        kept = max(len(last) - len(separator) + 1, 0)
        parts.append(last[:kept])
        tail = last[kept:]
    yield "".join([*parts, tail])


def _read_json_lines(reader: DocumentReader) -> Iterator[Document]:
    first, end = reader.span or (0, None)
    with _open(reader.file) as (stream, raw):
        if first:
            stream.seek(first - 1)
            _skip_line(stream)
        number = _LineNumber(reader.file, first)
        while end is None or stream.tell() < end:
            line = stream.readline(_LONGEST_LINE + 1)
            if not line:
                break
            number.count += 1
            reader.position = raw.tell() - first
            if len(line) > _LONGEST_LINE:
                reader.reject(Problem.LONG_LINE, number.in_file())
                if not line.endswith(b"\n"):
                    _skip_line(stream)
            elif line.strip():
                document = _document_of_line(line, reader.options.text_field)
                if isinstance(document, Problem):
                    reader.reject(document, number.in_file())
                else:
                    yield document


def _skip_line(stream: BinaryIO) -> None:
    while (part := stream.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


@dataclass
class _LineNumber:
    """The number of the current line. Lines before the span are counted only when `in_file` is called."""

    file: InputFile
    first: int
    count: int = 0
    before: int | None = None

    def in_file(self) -> int:
        if self.before is None:
            self.before = _lines_that_begin_before(self.file, self.first)
        return self.before + self.count


def _lines_that_begin_before(file: InputFile, end: int) -> int:
    if end == 0:
        return 0
    newlines, left = 0, end - 1
    with file.path.open("rb") as stream:
        while content := stream.read(min(1 << 20, left)):
            newlines += content.count(b"\n")
            left -= len(content)
    return newlines + 1


def _document_of_line(line: bytes, text_field: str) -> str | Problem:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Problem.NOT_UTF8
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return Problem.NO_JSON
    return _text_of(record, text_field) if isinstance(record, dict) else Problem.NO_JSON


def _text_of(record: dict[str, Any], text_field: str) -> str | Problem:
    """Return the text of a record. A field whose own name is `text_field` takes precedence over nested fields."""
    value: Any = record
    for name in [text_field] if text_field in record else text_field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value.strip():
        return Problem.NO_TEXT
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which has no UTF-8 encoding
        return Problem.NOT_UTF8
    return value


def _read_parquet(reader: DocumentReader) -> Iterator[Document]:
    from pyarrow import ArrowInvalid, parquet  # noqa: PLC0415 (only needed for this kind of file)

    try:
        with parquet.ParquetFile(reader.file.path) as table:
            names = _columns(table.schema_arrow.names, reader.options.text_field)
            rows = table.metadata.num_rows
            if not names:
                _reject_rows(reader, rows)
                return
            batches = table.iter_batches(_ARROW_ROWS, columns=names, use_threads=False)
            yield from _documents_of_batches(reader, batches, rows)
    except ArrowInvalid:
        reader.reject(Problem.BROKEN)


def _read_arrow(reader: DocumentReader) -> Iterator[Document]:
    from pyarrow import ArrowInvalid, ipc, memory_map  # noqa: PLC0415 (only needed for this kind of file)

    try:
        with memory_map(os.fspath(reader.file.path)) as source:
            try:
                opened = ipc.open_stream(source)  # the datasets library writes streams
                batches: Iterable[Any] = opened
            except ArrowInvalid:
                opened = ipc.open_file(source)
                batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
            names = _columns(opened.schema.names, reader.options.text_field)
            for batch in batches:
                if not names:
                    _reject_rows(reader, batch.num_rows)
                else:
                    yield from _documents_of_batches(reader, _slices(batch.select(names)), None)
                reader.position = source.tell()
    except ArrowInvalid:
        reader.reject(Problem.BROKEN)


def _columns(names: Sequence[str], text_field: str) -> list[str]:
    """Return the column named `text_field` or, if it is missing, the column named by the part before the first dot."""
    return [name for name in (text_field, text_field.split(".", maxsplit=1)[0]) if name in names][:1]


def _slices(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _ARROW_ROWS):
        yield batch.slice(start, _ARROW_ROWS)


def _documents_of_batches(reader: DocumentReader, batches: Iterable[Any], rows: int | None) -> Iterator[Document]:
    for batch in batches:
        for record in batch.to_pylist():
            reader.row += 1
            document = _text_of(record, reader.options.text_field)
            if isinstance(document, Problem):
                reader.reject(document, reader.row)
            else:
                yield document
        if rows:
            reader.position = reader.file.size * reader.row // rows


def _reject_rows(reader: DocumentReader, rows: int) -> None:
    for _ in range(rows):
        reader.row += 1
        reader.reject(Problem.NO_TEXT, reader.row)


_READERS: dict[Kind, Callable[[DocumentReader], Iterator[Document]]] = {
    Kind.TEXT: _read_text,
    Kind.JSON_LINES: _read_json_lines,
    Kind.PARQUET: _read_parquet,
    Kind.ARROW: _read_arrow,
}
