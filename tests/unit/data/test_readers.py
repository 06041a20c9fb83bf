"""Readers return all documents of valid input, and count and locate invalid input."""

import gzip
import json
from pathlib import Path

import pytest

from hypermoe_ds.data.readers import Problem, ReadReport, expand_inputs, read_documents
from hypermoe_ds.errors import UserError
from tests.helpers.corpus import stdlib_texts, write_jsonl

GOOD = b'{"text": "good"}\n'

BAD = {
    "empty.txt": (b"", Problem.EMPTY_FILE, ""),
    "blank.txt": (b" \n\t\n", Problem.EMPTY_FILE, ""),
    "empty.jsonl": (b"", Problem.EMPTY_FILE, ""),
    "latin.txt": ("caf\u00e9".encode("latin-1"), Problem.NOT_UTF8, ""),
    "latin.jsonl": (GOOD + b'{"text": "caf\xe9"}\n', Problem.NOT_UTF8, ":2"),
    "half_a_pair.jsonl": (GOOD + rb'{"text": "\ud83c"}', Problem.NOT_UTF8, ":2"),
    "no_json.jsonl": (GOOD + GOOD + b"text\n", Problem.NO_JSON, ":3"),
    "a_list.jsonl": (b'["text"]\n' + GOOD, Problem.NO_JSON, ":1"),
    "deep.jsonl": (GOOD + b"[" * 100_000, Problem.NO_JSON, ":2"),
    "no_field.jsonl": (GOOD + b'{"body": "x"}\n', Problem.NO_TEXT, ":2"),
    "a_number.jsonl": (GOOD + b'{"text": 3}\n', Problem.NO_TEXT, ":2"),
    "empty_text.jsonl": (GOOD + b"\n" + b'{"text": ""}\n', Problem.NO_TEXT, ":3"),
    "no_gzip.jsonl.gz": (GOOD, Problem.BROKEN_GZIP, ""),
    "cut.jsonl.gz": (gzip.compress(GOOD * 1000)[:-9], Problem.BROKEN_GZIP, ""),
}


def read(files: list[Path], **options: object) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    return list(read_documents(files, report, **options)), report  # type: ignore[arg-type]


def test_every_kind_of_file_gives_the_same_text(tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in stdlib_texts(3)]
    texts.append("r\r\nn\n \t ünï\u2028 🎉 ")
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    lines = write_jsonl(tmp_path / "a.jsonl", texts, text_field="body")
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    size = sum(len(text.encode()) for text in texts)
    for files in (sorted(tmp_path.glob("*.txt")), [lines], [packed]):
        documents, report = read(files, text_field="body")
        assert documents == texts
        assert (report.documents, report.text_bytes, report.skipped) == (len(texts), size, {})


def test_a_byte_order_mark_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read([tmp_path / "a.txt", tmp_path / "a.jsonl"])[0] == ["hello", "good"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_counted_with_its_first_location_and_refused_if_strict(tmp_path: Path, name: str) -> None:
    content, problem, line = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    good = tmp_path / "good.txt"
    good.write_text("still read")
    documents, report = read([path, path, good])
    assert documents[-1] == "still read"
    assert report.documents == len(documents)
    assert report.skipped == {problem: 2}
    assert report.first == {problem: f"{path}{line}"}
    assert f"2 with {problem} (first: {path}{line})" in report.describe_skipped()
    with pytest.raises(UserError, match=f"{path}{line}: {problem}; "):
        read([path], strict=True)


def test_lines_before_the_end_of_a_truncated_gzip_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(9999)))[:-9])
    documents, report = read([path])
    assert documents == [str(n) for n in range(len(documents))]
    assert len(documents) > 9000
    assert report.skipped == {Problem.BROKEN_GZIP: 1}


def test_reports_add_up_in_order() -> None:
    first, second = ReadReport(2, 10), ReadReport(3, 20)
    first.skip(Problem.NO_JSON, "a:1", strict=False)
    second.skip(Problem.NO_JSON, "b:1", strict=False)
    second.skip(Problem.NO_TEXT, "b:2", strict=False)
    first.add(second)
    assert first == ReadReport(5, 30, first.skipped, {Problem.NO_JSON: "a:1", Problem.NO_TEXT: "b:2"})
    assert first.skipped == {Problem.NO_JSON: 2, Problem.NO_TEXT: 1}


def test_visible_files_of_a_folder_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".git/config", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in expand_inputs([tmp_path, tmp_path / "b.txt"])]
    assert found == ["a/b/c.txt", "a/z.txt", "b.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "problem"), [("none.txt", "no such file"), ("*.txt", "matches no file"), ("", "folder without files")]
)
def test_missing_inputs_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        expand_inputs([tmp_path / name])
