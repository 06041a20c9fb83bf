"""The report on token files shows the true counts, and verification finds every changed byte."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hypermoe_ds.data.token_files import content_digest, document_lengths, read_metadata
from hypermoe_ds.data.token_report import bytes_to_verify, document_text, plot_lengths, report_lines, verify
from hypermoe_ds.data.tokenizer import load_tokenizer
from hypermoe_ds.errors import UserError
from tests.helpers.corpus import TokenisedCorpus, write_token_files

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def prefix(corpus: TokenisedCorpus, tmp_path: Path) -> str:
    """Return the prefix of a copy of the validation files that a test may damage."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus.valid}{suffix}", f"{tmp_path}/valid{suffix}")
    return f"{tmp_path}/valid"


def flip(path: str, position: int) -> None:
    """Flip one bit of a file, without changing its size."""
    content = bytearray(Path(path).read_bytes())
    content[position] ^= 1
    Path(path).write_bytes(content)


def test_the_report_shows_the_counts_of_the_documents(corpus: TokenisedCorpus, prefix: str) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer)
    texts = [path.read_text(encoding="utf-8") for path in corpus.texts[-4:]]
    counts = np.array([len(tokenizer(text)["input_ids"]) + 1 for text in texts])
    first, lengths, size, _, unknown, made_from = report_lines(prefix)
    assert first == f"{prefix}: 4 documents, {counts.sum():,} tokens of type uint16"
    assert lengths.startswith(f"tokens per document: mean {counts.mean():,.1f}, percentiles ")
    assert f"{np.median(counts):,.0f} (50 %)" in lengths
    assert lengths.endswith(f"longest {counts.max():,}")
    text_bytes = sum(len(text.encode()) for text in texts)
    assert size.startswith(f"text: {text_bytes:,} bytes, ")
    assert unknown == f"unknown tokens: 0 of the first {counts.sum():,} (0.00%)"
    assert made_from.startswith(f"made from 4 files of {text_bytes:,} bytes, with git_commit ")


def test_unknown_tokens_are_counted(corpus: TokenisedCorpus, prefix: str) -> None:
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    tokens[:30] = load_tokenizer(corpus.tokenizer).unk_token_id
    tokens.tofile(f"{prefix}.bin")
    assert f"unknown tokens: 30 of the first {len(tokens):,} ({30 / len(tokens):.2%})" in report_lines(prefix)


def test_the_plot_is_a_png_image(prefix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_lengths(prefix, f"{tmp_path}/lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"none/lengths\.png: cannot be written"):
        plot_lengths(prefix, f"{tmp_path}/none/lengths.png")


def test_files_made_elsewhere_are_reported_without_metadata(tmp_path: Path) -> None:
    write_token_files(f"{tmp_path}/plain", [[5, 6, 2], [7, 2]])
    first, lengths, missing = report_lines(f"{tmp_path}/plain")
    assert first.endswith("plain: 2 documents, 5 tokens of type uint16")
    assert lengths == "tokens per document: mean 2.5, percentiles 2 (1 %), 2 (50 %), 3 (99 %), longest 3"
    assert "plain.json is missing" in missing
    with pytest.raises(UserError, match=r"--tokenizer: is needed, because .*plain\.json is missing"):
        document_text(f"{tmp_path}/plain", 0, None)
    with pytest.raises(UserError, match=r"plain\.json: has no hash of the token files"):
        bytes_to_verify(f"{tmp_path}/plain")


def test_a_document_is_decoded_to_its_text(corpus: TokenisedCorpus, prefix: str) -> None:
    end = load_tokenizer(corpus.tokenizer).eos_token
    for number, path in enumerate(corpus.texts[-4:]):
        assert document_text(prefix, number, None) == document_text(prefix, number, str(corpus.tokenizer))
        assert document_text(prefix, number, str(corpus.tokenizer)) == path.read_text(encoding="utf-8") + end
    with pytest.raises(UserError, match=r"--document 4: .* has 4 documents"):
        document_text(prefix, 4, str(corpus.tokenizer))


def test_preprocessing_records_the_hashes_of_both_files(prefix: str) -> None:
    metadata = read_metadata(prefix)
    assert metadata is not None
    assert metadata.bin_sha256 == hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
    assert metadata.idx_sha256 == hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
    assert metadata.bin_digest == content_digest(Path(f"{prefix}.bin"))
    read: list[int] = []
    verify(prefix, read.append)
    assert sum(read) == bytes_to_verify(prefix)


@pytest.mark.parametrize("position", [0, 1001, -1])
def test_verification_finds_a_flipped_bit_in_the_tokens(prefix: str, position: int) -> None:
    flip(f"{prefix}.bin", position)
    with pytest.raises(UserError, match=r"valid\.bin: differs from the file that preprocessing wrote"):
        verify(prefix, int)


def test_verification_finds_a_flipped_bit_in_the_offsets_of_the_index(prefix: str) -> None:
    flip(f"{prefix}.idx", -1)
    with pytest.raises(UserError, match=r"valid\.idx: differs from the file that preprocessing wrote"):
        verify(prefix, int)


def test_the_digest_reads_at_most_four_mebibytes_but_depends_on_the_first_and_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10**10)  # reading the whole file would take seconds and 10 GB of page cache
    empty = content_digest(path)
    for position in (0, 10**10 - 1):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"x")
        changed = content_digest(path)
        assert changed != empty
        empty = changed
    path.write_bytes(b"")
    assert content_digest(path) == hashlib.sha256(b"0").hexdigest()


def test_lengths_are_those_of_the_index(tmp_path: Path) -> None:
    write_token_files(f"{tmp_path}/plain", [[5, 6, 2], [7, 2], [2]])
    assert document_lengths(f"{tmp_path}/plain").tolist() == [3, 2, 1]


def test_the_tool_reports_verifies_and_fails_with_one_line(corpus: TokenisedCorpus, prefix: str) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / "tools/inspect_data.py"), prefix, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)

    done = run("--verify", "--document", "1", "--tokenizer", str(corpus.tokenizer))
    assert done.returncode == 0, done.stderr
    assert corpus.texts[-3].read_text(encoding="utf-8") in done.stdout
    assert done.stdout.endswith(f"verified: both files are the ones that {prefix}.json describes\n")
    flip(f"{prefix}.bin", 7)
    done = run("--verify")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {prefix}.bin: differs from the file")
