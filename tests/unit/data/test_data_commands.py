"""Run the data commands as a user does; on bad input, they print one line, exit with a code and write nothing."""

import gzip
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from hypermoe_ds.data.token_files import read_metadata
from tests.helpers.corpus import TokenisedCorpus, stdlib_texts, write_jsonl

TOOLS = Path(__file__).parents[3] / "tools"

INPUTS = {
    "empty.txt": b"",
    "latin.txt": b"caf\xe9",
    "no_json.jsonl": b'{"text": "good"}\nno json\n',
    "no_field.jsonl": b'{"body": "good"}\n',
    "cut.jsonl.gz": gzip.compress(b'{"text": "good"}\n' * 999)[:-9],
}

# name: (script, arguments, part of the error). TEXT is a valid file, TOKENIZER a valid folder, OUT the output.
BAD = {
    "train missing input": ("train", "--input none.txt --vocab-size 400", "none.txt: no such file"),
    "train pattern": ("train", "--input *.nothing --vocab-size 400", "*.nothing: the pattern matches no file"),
    "train empty folder": ("train", "--input folder --vocab-size 400", "folder: is a folder without files"),
    "train too large": ("train", "--input TEXT --vocab-size 90000", "vocab_size=90000: is too large for this text"),
    "train too small": ("train", "--input TEXT --vocab-size 100", "vocab_size=100: is too small for the characters"),
    "train no size": ("train", "--input TEXT --vocab-size 0", "vocab_size=0: is not a number of tokens"),
    "train no text": ("train", "--input empty.txt --vocab-size 400", "contain no document: 1 with empty file"),
    "train no field": (
        "train",
        "--input no_field.jsonl --vocab-size 400",
        "set --text-field to the field that contains the text",
    ),
    "train strict empty": ("train", "--strict --input TEXT empty.txt --vocab-size 400", "empty.txt: empty file"),
    "train strict latin": ("train", "--strict --input latin.txt --vocab-size 400", "latin.txt: no UTF-8 text"),
    "train strict json": ("train", "--strict --input no_json.jsonl --vocab-size 400", "jsonl:2: no JSON object"),
    "train strict field": ("train", "--strict --input no_field.jsonl --vocab-size 400", "jsonl:1: no text in the"),
    "train strict gzip": ("train", "--strict --input cut.jsonl.gz --vocab-size 400", "cut.jsonl.gz: broken data"),
    "train output exists": ("train", "--input TEXT --vocab-size 400 --output TOKENIZER", "exists already; remove it"),
    "missing input": ("preprocess", "--input none.txt --tokenizer TOKENIZER", "none.txt: no such file"),
    "missing tokenizer": ("preprocess", "--input TEXT --tokenizer none", "none: no such tokenizer folder"),
    "no tokenizer": ("preprocess", "--input TEXT --tokenizer folder", "folder: has no tokenizer"),
    "no workers": ("preprocess", "--input TEXT --tokenizer TOKENIZER --workers 0", "workers=0: is not a number"),
    "output exists": ("preprocess", "--input TEXT --tokenizer TOKENIZER --output VALID", "valid.bin: exists already"),
    "output is a folder": ("preprocess", "--input TEXT --tokenizer TOKENIZER --output folder", "folder: is a folder"),
    "output in a file": ("preprocess", "--input TEXT --tokenizer TOKENIZER --output empty.txt/x", "cannot be written"),
    "no document": ("preprocess", "--input empty.txt --tokenizer TOKENIZER", "contain no document"),
    "strict json": ("preprocess", "--strict --input no_json.jsonl --tokenizer TOKENIZER", "jsonl:2: no JSON object"),
}


@dataclass
class Outcome:
    done: subprocess.CompletedProcess[str]
    files_before: list[str]
    files_after: list[str]


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def start(script: str, arguments: list[str], folder: Path) -> Outcome:
    script = {"train": "train_tokenizer.py", "preprocess": "preprocess_data.py"}.get(script, script)
    before = files_in(folder)
    done = subprocess.run(
        [sys.executable, str(TOOLS / script), *arguments],
        capture_output=True, text=True, cwd=folder, timeout=120, check=False,
    )  # fmt: skip
    return Outcome(done, before, files_in(folder))


@pytest.fixture(scope="module")
def outcomes(corpus: TokenisedCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Run all bad commands, each in its own folder, in parallel on all cores."""
    names = {"TEXT": str(corpus.texts[0]), "TOKENIZER": str(corpus.tokenizer), "VALID": corpus.valid}

    def run(name: str) -> Outcome:
        script, arguments, _ = BAD[name]
        folder = tmp_path_factory.mktemp("command")
        (folder / "folder").mkdir()
        for file, content in INPUTS.items():
            (folder / file).write_bytes(content)
        line = [names.get(word, word) for word in arguments.split()]
        return start(script, line if "--output" in line else [*line, "--output", "new/out"], folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(BAD, pool.map(run, BAD), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_prints_one_line_and_writes_nothing(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert outcome.done.returncode == 2
    lines = outcome.done.stderr.splitlines()
    assert len(lines) == 1, outcome.done.stderr
    assert lines[0].startswith("error: ")
    assert BAD[name][2] in lines[0]
    assert ";" in lines[0], "the error names no remedy"
    assert outcome.files_after == outcome.files_before


def test_commands_turn_text_into_a_tokenizer_and_token_files(tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in stdlib_texts(4)]
    write_jsonl(tmp_path / "a.jsonl", texts, "body")
    with (tmp_path / "a.jsonl").open("a") as lines:
        lines.write("{}\n")
    common = ["--input", "a.jsonl", "--text-field", "body"]
    trained = start("train", [*common, "--vocab-size", "500", "--output", "tokenizer"], tmp_path)
    assert (trained.done.returncode, trained.done.stdout.splitlines()) == (
        0,
        ["tokenizer: 500 tokens, learned from 4 documents"],
    )
    assert trained.done.stderr == "warning: rejected 1 with no text in the field (first: a.jsonl:5)\n"
    made = start(
        "preprocess",
        [*common, "--tokenizer", "tokenizer", "--output", "out", "--workers", "2", "--max-rejected", "20%"],
        tmp_path,
    )
    assert (made.done.returncode, made.done.stderr) == (0, "")
    metadata = read_metadata(str(tmp_path / "out"))
    assert metadata is not None
    assert metadata.vocab_size == 500
    size = sum(len(text.encode()) for text in texts)
    [summary] = made.done.stdout.splitlines()
    assert summary.startswith(f"out: 4 documents, {metadata.tokens:,} tokens, {size:,} bytes of text, ")
    assert summary.endswith("rejected: 1 with no text in the field (first: a.jsonl:5)")
    assert sorted(set(made.files_after) - set(made.files_before)) == [
        "out.bin", "out.idx", "out.json", "out.rejected.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["train", "preprocess"])
def test_help_names_the_units(script: str, tmp_path: Path) -> None:
    text = start(script, ["--help"], tmp_path).done.stdout
    assert "number of" in text
    assert "--strict" in text
