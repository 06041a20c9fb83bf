"""Readers return all documents of valid input, and report and locate invalid input."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from backports import zstd
from pyarrow import ipc, parquet

from hypermoe_ds.data import readers
from hypermoe_ds.data.inputs import find_inputs
from hypermoe_ds.data.readers import (
    DocumentReader,
    LongText,
    LostDocumentError,
    Problem,
    ReadOptions,
    ReadReport,
    Rejection,
)
from hypermoe_ds.errors import UserError
from tests.helpers.corpus import stdlib_texts, write_jsonl

GOOD = b'{"text": "good"}\n'
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}

BAD = {
    "empty.txt": (b"", Problem.EMPTY_FILE, None),
    "blank.txt": (b" \n\t\n", Problem.EMPTY_FILE, None),
    "empty.jsonl": (b"", Problem.EMPTY_FILE, None),
    "latin.txt": ("caf\u00e9".encode("latin-1"), Problem.NOT_UTF8, None),
    "latin.jsonl": (GOOD + b'{"text": "caf\xe9"}\n', Problem.NOT_UTF8, 2),
    "half_a_pair.jsonl": (GOOD + rb'{"text": "\ud83c"}', Problem.NOT_UTF8, 2),
    "no_json.jsonl": (GOOD + GOOD + b"text\n", Problem.NO_JSON, 3),
    "a_list.jsonl": (b'["text"]\n' + GOOD, Problem.NO_JSON, 1),
    "deep.jsonl": (GOOD + b"[" * 100_000, Problem.NO_JSON, 2),
    "no_field.jsonl": (GOOD + b'{"body": "x"}\n', Problem.NO_TEXT, 2),
    "a_number.jsonl": (GOOD + b'{"text": 3}\n', Problem.NO_TEXT, 2),
    "empty_text.jsonl": (GOOD + b"\n" + b'{"text": ""}\n', Problem.NO_TEXT, 3),
    "no_table.parquet": (GOOD, Problem.BROKEN, None),
    "no_table.arrow": (GOOD, Problem.BROKEN, None),
    **{f"plain.jsonl{suffix}": (GOOD, Problem.BROKEN, None) for suffix in COMPRESS},
    **{f"cut.jsonl{suffix}": (compress(GOOD * 9)[:-5], Problem.BROKEN, None) for suffix, compress in COMPRESS.items()},
}


def read(files: list[Path], options: ReadOptions | None = None) -> tuple[list[str], list[Rejection]]:
    documents, rejections = [], list[Rejection]()
    for file in find_inputs(files):
        for document in DocumentReader(file, options or ReadOptions(), rejections.append):
            documents.append("".join(document.pieces()) if isinstance(document, LongText) else document)
    return documents, rejections


def test_every_kind_of_file_gives_the_same_text(tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in stdlib_texts(3)]
    texts.append("r\r\nn\n \t ünï\u2028 🎉 ")
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    lines = write_jsonl(tmp_path / "a.jsonl", texts, text_field="body")
    table = pyarrow.table({"body": texts, "url": ["x"] * 4})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    with ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as file:
        file.write_table(table)
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"a.ndjson{suffix}").write_bytes(compress(lines.read_bytes()))
    others = [path for path in tmp_path.iterdir() if path.suffix != ".txt"]
    assert len(others) == 8
    for files in (sorted(tmp_path.glob("*.txt")), *([path] for path in others)):
        assert read(files, ReadOptions(text_field="body")) == (texts, []), files


def test_a_dotted_name_selects_a_nested_field_unless_a_field_has_the_dotted_name(tmp_path: Path) -> None:
    records = [{"a": {"b": "nested"}}, {"a.b": "dotted", "a": {"b": "x"}}, {"a": "b"}, {"a": {"c": "x"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    documents, rejections = read([tmp_path / "a.jsonl"], ReadOptions(text_field="a.b"))
    assert documents == ["nested", "dotted"]
    assert [(each.line, each.reason) for each in rejections] == [(3, Problem.NO_TEXT), (4, Problem.NO_TEXT)]
    parquet.write_table(pyarrow.table({"a": [{"b": "nested"}, {"b": None}]}), tmp_path / "a.parquet")
    documents, rejections = read([tmp_path / "a.parquet"], ReadOptions(text_field="a.b"))
    assert documents == ["nested"]
    assert [(each.line, each.reason) for each in rejections] == [(2, Problem.NO_TEXT)]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_each_row_of_a_table_without_the_field_is_rejected(tmp_path: Path, suffix: str) -> None:
    table = pyarrow.table({"body": ["x"] * 3})
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    documents, rejections = read([tmp_path / f"a{suffix}"])
    assert documents == []
    assert [(each.line, each.reason) for each in rejections] == [(row, Problem.NO_TEXT) for row in (1, 2, 3)]


def test_a_byte_order_mark_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read([tmp_path / "a.txt", tmp_path / "a.jsonl"])[0] == ["hello", "good"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_with_its_location_and_refused_if_strict(tmp_path: Path, name: str) -> None:
    content, problem, line = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    good = tmp_path / "good.txt"
    good.write_text("still read")
    documents, rejections = read([path, path, good])
    assert documents[-1] == "still read"
    assert rejections == [Rejection(str(path), line, problem)] * 2
    location = str(path) if line is None else f"{path}:{line}"
    with pytest.raises(UserError, match=f"{location}: {problem}; "):
        read([path], ReadOptions(strict=True))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines_before_the_end_of_a_truncated_file_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.jsonl{suffix}"
    lines = b"".join(json.dumps({"text": str(n) * 99}).encode() + b"\n" for n in range(30_000))
    path.write_bytes(COMPRESS[suffix](lines)[:-9])
    documents, rejections = read([path])
    assert documents == [str(n) * 99 for n in range(len(documents))]
    assert [each.reason for each in rejections] == [Problem.BROKEN]
    assert len(documents) > 1000 or suffix == ".bz2"  # bz2 compresses blocks of 900 kB


@pytest.mark.parametrize("piece", [1, 3, 1 << 18])
def test_a_separator_divides_a_text_file_into_documents(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_PIECE_BYTES", piece)
    (tmp_path / "a.txt").write_text("<<>>one<<>>tw<<o\n<<>> <<>>three<<>", encoding="utf-8")
    assert read([tmp_path / "a.txt"], ReadOptions(separator="<<>>")) == (["one", "tw<<o\n", "three<<>"], [])


def test_a_long_text_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONG_BYTES", 100)
    monkeypatch.setattr(readers, "_PIECE_BYTES", 7)
    text = "é漢🎉 abc\r\n" * 50
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "latin.txt").write_bytes(text.encode() + b"\xff")
    (tmp_path / "blank.txt").write_bytes(b" " * 500)
    for name in ("a.txt", "b.txt.gz"):
        reader = DocumentReader(find_inputs([tmp_path / name])[0], ReadOptions(), pytest.fail)
        [document] = reader
        assert isinstance(document, LongText)
        assert document.text_bytes == len(text.encode())
        assert "".join(document.pieces()) == text
        assert reader.position == reader.file.size
    documents, rejections = read([tmp_path / "latin.txt", tmp_path / "blank.txt"])
    assert documents == []
    assert [each.reason for each in rejections] == [Problem.NOT_UTF8, Problem.EMPTY_FILE]


def test_a_long_text_whose_file_disappears_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "lost.txt").write_text("x")
    [file] = find_inputs([tmp_path / "lost.txt"])
    file.path.unlink()
    with pytest.raises(LostDocumentError, match="No such file"):
        list(LongText(file, 1).pieces())


def test_a_line_that_is_too_long_is_rejected_and_the_next_line_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_LONGEST_LINE", 100)
    long = json.dumps({"text": "x" * 5000}).encode()
    (tmp_path / "a.jsonl").write_bytes(GOOD + long + b"\n" + GOOD + long)
    documents, rejections = read([tmp_path / "a.jsonl"])
    assert documents == ["good", "good"]
    assert [(each.line, each.reason) for each in rejections] == [(2, Problem.LONG_LINE), (4, Problem.LONG_LINE)]


@pytest.mark.parametrize("newline_at_the_end", [True, False])
def test_spans_of_a_file_yield_each_line_once_with_its_number(tmp_path: Path, newline_at_the_end: bool) -> None:
    texts = [str(n) * n for n in range(1, 12)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines.insert(4, "no json")
    lines.insert(0, "")
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n" * newline_at_the_end)
    [file] = find_inputs([tmp_path / "a.jsonl"])
    for size in range(1, file.size + 1):
        documents, rejections = list[object](), list[Rejection]()
        for first in range(0, file.size, size):
            span = (first, min(first + size, file.size))
            documents += DocumentReader(file, ReadOptions(), rejections.append, span)
        assert documents == texts
        assert [(each.line, each.reason) for each in rejections] == [(6, Problem.NO_JSON)]


def test_adding_reports_sums_counts_and_keeps_the_first_location() -> None:
    first, second = ReadReport(2, 10), ReadReport(3, 20)
    first.reject(Rejection("a", 1, Problem.NO_JSON))
    second.reject(Rejection("b", 1, Problem.NO_JSON))
    second.reject(Rejection("b", None, Problem.NO_TEXT))
    first.add(second)
    assert first == ReadReport(
        5, 30, {Problem.NO_JSON: 2, Problem.NO_TEXT: 1}, {Problem.NO_JSON: "a:1", Problem.NO_TEXT: "b"}
    )
    assert first.describe_rejected() == "2 with no JSON object (first: a:1), 1 with no text in the field (first: b)"
