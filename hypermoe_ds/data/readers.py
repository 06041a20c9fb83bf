"""Read documents from files: each text file and each line of a JSONL file is one document."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, cast

from hypermoe_ds.errors import UserError

_GLOB_CHARACTERS = frozenset("*?[")


class Problem(StrEnum):
    """Reasons why an input contains no document."""

    EMPTY_FILE = "empty file"
    NOT_UTF8 = "no UTF-8 text"
    BROKEN_GZIP = "broken gzip data"
    NO_JSON = "no JSON object"
    NO_TEXT = "no text in the field"


_REMEDIES = {
    Problem.EMPTY_FILE: "remove the file from the inputs",
    Problem.NOT_UTF8: "convert the file to UTF-8 or remove it from the inputs",
    Problem.BROKEN_GZIP: "fetch or compress the file again",
    Problem.NO_JSON: "correct or remove that line",
    Problem.NO_TEXT: "give the name of the field that holds the text, or remove that line",
}


@dataclass
class ReadReport:
    """Counts of read documents and skipped inputs.

    Attributes:
        documents: number of documents read.
        text_bytes: total size of the documents in UTF-8 bytes.
        skipped: number of skipped files or lines, by problem.
        first: first location of each problem, as `file` or `file:line`.
    """

    documents: int = 0
    text_bytes: int = 0
    skipped: Counter[Problem] = field(default_factory=Counter)
    first: dict[Problem, str] = field(default_factory=dict)

    def skip(self, problem: Problem, location: str, strict: bool) -> None:
        """Count a skipped file or line.

        Raises:
            UserError: `strict` is set.
        """
        if strict:
            raise UserError(location, problem, _REMEDIES[problem])
        self.skipped[problem] += 1
        self.first.setdefault(problem, location)

    def add(self, later: "ReadReport") -> None:
        """Merge the report of later files into this report."""
        self.documents += later.documents
        self.text_bytes += later.text_bytes
        self.skipped += later.skipped
        self.first = later.first | self.first

    def require_documents(self, text_field: str) -> None:
        """Check that at least one document was read.

        Raises:
            UserError: no document was read.
        """
        if self.documents > 0:
            return
        problem = f"have no document: {self.describe_skipped()}" if self.skipped else "have no document"
        remedy = "give files with text"
        if Problem.NO_TEXT in self.skipped:
            remedy = f"give the name of the field that holds the text (it is '{text_field}' now)"
        raise UserError("the inputs", problem, remedy)

    def describe_skipped(self) -> str:
        """Describe the skipped inputs in one line, or return an empty string if no input was skipped."""
        return ", ".join(
            f"{count} with {problem} (first: {self.first[problem]})" for problem, count in self.skipped.items()
        )


def expand_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """Return all input files in order. A folder is replaced by the files in it, recursively and sorted by name.

    Hidden files and folders inside a folder are skipped.

    Raises:
        UserError: an input does not exist, is a pattern without matches, or is a folder without files.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*") if entry.is_file() and not _is_hidden(entry, path))
            if not inside:
                raise UserError(str(path), "is a folder without files", "give files, or a folder with files")
            files.extend(inside)
        elif path.exists():
            files.append(path)
        elif _GLOB_CHARACTERS & set(str(path)):
            raise UserError(str(path), "the pattern matches no file", "check the folder and the pattern")
        else:
            raise UserError(str(path), "no such file", "check the path")
    return files


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def read_documents(
    files: Sequence[Path], report: ReadReport, text_field: str = "text", strict: bool = False
) -> Iterator[str]:
    """Yield the documents of `files` in order, and count documents and skipped inputs in `report`.

    Files named `*.jsonl` or `*.jsonl.gz` contain one JSON object per line, with the document in `text_field`; blank
    lines are skipped. Any other file is one document. A byte order mark is removed.

    Raises:
        UserError: a file cannot be read or, with `strict`, a file or line contains no document.
    """
    for path in files:
        try:
            yield from _documents_of(path, report, text_field, strict)
        except OSError as error:
            raise UserError(str(path), f"cannot be read ({error.strerror or error})", "check the file") from None


def _documents_of(path: Path, report: ReadReport, text_field: str, strict: bool) -> Iterator[str]:
    lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    if lines and path.stat().st_size == 0:
        report.skip(Problem.EMPTY_FILE, str(path), strict)
    elif path.name.endswith(".jsonl"):
        with path.open("rb") as stream:
            yield from _documents_of_jsonl(stream, path, report, text_field, strict)
    elif lines:
        try:
            with gzip.open(path, "rb") as stream:
                yield from _documents_of_jsonl(cast(BinaryIO, stream), path, report, text_field, strict)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            report.skip(Problem.BROKEN_GZIP, str(path), strict)
    else:
        document = _read(path.read_bytes(), Problem.EMPTY_FILE)
        if isinstance(document, Problem):
            report.skip(document, str(path), strict)
        else:
            yield _counted(document, report)


def _documents_of_jsonl(
    stream: BinaryIO, path: Path, report: ReadReport, text_field: str, strict: bool
) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        document = _document_of_line(line, text_field)
        if isinstance(document, Problem):
            report.skip(document, f"{path}:{number}", strict)
        else:
            yield _counted(document, report)


def _document_of_line(line: bytes, text_field: str) -> str | Problem:
    text = _read(line, Problem.NO_JSON)
    if isinstance(text, Problem):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return Problem.NO_JSON
    if not isinstance(record, dict):
        return Problem.NO_JSON
    document = record.get(text_field)
    if not isinstance(document, str) or not document.strip():
        return Problem.NO_TEXT
    try:
        document.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which has no UTF-8 encoding
        return Problem.NOT_UTF8
    return document


def _read(content: bytes, if_blank: Problem) -> str | Problem:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Problem.NOT_UTF8
    return text if text.strip() else if_blank


def _counted(document: str, report: ReadReport) -> str:
    report.documents += 1
    report.text_bytes += len(document) if document.isascii() else len(document.encode())
    return document
