"""Every input file is read according to its kind, or refused by name before the job starts."""

import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc

from hypermoe_ds.data.inputs import Kind, find_inputs
from hypermoe_ds.errors import UserError

KINDS = {
    "a.txt": (Kind.TEXT, ""),
    "README.MD": (Kind.TEXT, ""),
    "code.py": (Kind.TEXT, ""),
    "a.txt.xz": (Kind.TEXT, ".xz"),
    "a.jsonl": (Kind.JSON_LINES, ""),
    "a.JSONL": (Kind.JSON_LINES, ""),
    "a.ndjson": (Kind.JSON_LINES, ""),
    "corpus.json": (Kind.JSON_LINES, ""),
    "corpus.json.gz": (Kind.JSON_LINES, ".gz"),
    "a.jsonl.zst": (Kind.JSON_LINES, ".zst"),
    "a.jsonl.bz2": (Kind.JSON_LINES, ".bz2"),
    "a.parquet": (Kind.PARQUET, ""),
    "a.arrow": (Kind.ARROW, ""),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_suffix_decides_the_kind_and_the_compression(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    [found] = find_inputs([tmp_path / name])
    assert (found.kind, found.compression) == KINDS[name]
    assert found.size == 1


@pytest.mark.parametrize("name", ["table.csv", "LICENSE", "a.tsv.gz", "image.png", "a.zip"])
def test_unknown_kinds_are_refused_by_name_unless_their_kind_is_given(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name}: has an unknown suffix; .*--as text"):
        find_inputs([tmp_path / "folder"])
    assert [file.kind for file in find_inputs([tmp_path / "folder"], Kind.TEXT)] == [Kind.TEXT]


def test_visible_files_of_a_folder_are_read_in_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".git/config", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [file.path.relative_to(tmp_path).as_posix() for file in find_inputs([tmp_path, tmp_path / "b.txt"])]
    assert found == ["a/b/c.txt", "a/z.txt", "b.txt", "b.txt"]


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "a" / "1.txt").write_text("x")
    (tmp_path / "elsewhere" / "2.txt").write_text("x")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    assert [file.path.name for file in find_inputs([tmp_path / "in"])] == ["1.txt", "2.txt"]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("x")
    listed = os.listdir

    def refuse(path: Path) -> list[str]:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=r"closed: cannot be listed \(Permission denied\)"):
        find_inputs([tmp_path])


def test_a_file_that_cannot_be_opened_is_refused_before_any_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("x")
    opened = Path.open

    def refuse(path: Path, *mode: str) -> object:
        if path.name != "a.txt":
            raise PermissionError(13, "Permission denied")
        return opened(path, *mode)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"b\.txt: cannot be opened \(Permission denied\), and 1 other files; "):
        find_inputs([tmp_path])


def test_a_dangling_link_and_a_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lost.txt").symlink_to(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"lost\.txt: cannot be read"):
        find_inputs([tmp_path])
    (tmp_path / "lost.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt: is not a regular file"):
        find_inputs([tmp_path])


def save_dataset(folder: Path, texts: list[str]) -> None:
    """Write a folder as `Dataset.save_to_disk` of the datasets library does, and add a cache file of that library."""
    folder.mkdir(parents=True)
    table = pyarrow.table({"text": texts})
    for name in ("data-00000-of-00001.arrow", "cache-1234.arrow"):
        with ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def test_only_the_data_files_of_a_datasets_folder_are_read(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved" / "train", ["x"])
    assert [file.path.name for file in find_inputs([tmp_path / "saved"])] == ["data-00000-of-00001.arrow"]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="saved: is a datasets folder with several splits; give the folder of one"):
        find_inputs([tmp_path / "saved"])
    (tmp_path / "saved" / "train" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json: does not list the data files"):
        find_inputs([tmp_path / "saved" / "train"])


@pytest.mark.parametrize(
    ("name", "problem"), [("none.txt", "no such file"), ("*.txt", "matches no file"), ("", "folder without files")]
)
def test_missing_inputs_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        find_inputs([tmp_path / name])
