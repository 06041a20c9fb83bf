"""Describe token files, decode their documents, and verify them against the hashes in `PREFIX.json`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hypermoe_ds.data.token_files import Metadata, document_lengths, inspect, read_metadata
from hypermoe_ds.data.tokenizer import load_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import sha256_of

_PERCENTILES = (1, 50, 99)


def report_lines(prefix: str) -> Iterator[str]:
    """Yield lines that describe the token files: counts, lengths of the documents in tokens, and the tokenizer.

    Raises:
        UserError: a file is missing, truncated or not a token file.
    """
    files, metadata, lengths = inspect(prefix), read_metadata(prefix), document_lengths(prefix)
    yield f"{prefix}: {len(lengths):,} documents, {files.tokens:,} tokens of type {files.dtype}"
    shares = ", ".join(f"{value:,.0f} ({share} %)" for share, value in _percentiles(lengths))
    yield f"tokens per document: mean {lengths.mean():,.1f}, percentiles {shares}, longest {lengths.max():,}"
    if metadata is None:
        yield f"{prefix}.json is missing: the files were not written by tools/preprocess_data.py"
        return
    yield f"text: {metadata.text_bytes:,} bytes, {metadata.bytes_per_token:.2f} bytes per token"
    yield (
        f"tokenizer: {metadata.tokenizer} ({metadata.tokenizer_file}), {metadata.vocab_size:,} token ids, "
        f"end-of-sequence token {metadata.eos_id}"
    )


def _percentiles(lengths: np.ndarray[tuple[int], np.dtype[np.int32]]) -> list[tuple[int, float]]:
    return list(zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES).tolist(), strict=True))


def bytes_to_verify(prefix: str) -> int:
    """Return the number of bytes that `verify` reads.

    Raises:
        UserError: see `verify`, except that no hash has been compared.
    """
    _described(prefix)
    return sum(Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx"))


def verify(prefix: str, progress: Callable[[int], object]) -> None:
    """Compare the whole token files with the hashes in `PREFIX.json`.

    Args:
        prefix: path of the files without suffix.
        progress: called with the number of bytes read since the last call.

    Raises:
        UserError: a file differs from the one that preprocessing wrote, or `PREFIX.json` has no hashes.
    """
    metadata = _described(prefix)
    for suffix, expected in ((".bin", metadata.bin_sha256), (".idx", metadata.idx_sha256)):
        if sha256_of(Path(f"{prefix}{suffix}"), progress) != expected:
            problem = f"differs from the file that preprocessing wrote (SHA-256 in {prefix}.json)"
            raise UserError(f"{prefix}{suffix}", problem, "restore it, or run tools/preprocess_data.py again")


def _described(prefix: str) -> Metadata:
    """Return the metadata of consistent token files that have hashes."""
    inspect(prefix)
    metadata = read_metadata(prefix)
    if metadata is None or not metadata.bin_sha256:
        raise UserError(f"{prefix}.json", "has no hash of the token files", "run tools/preprocess_data.py again")
    return metadata


def document_text(prefix: str, number: int, tokenizer: str | None) -> str:
    """Decode a document, including its end-of-sequence token.

    Args:
        prefix: path of the files without suffix.
        number: index of the document, from 0.
        tokenizer: the tokenizer folder; None uses the one that `PREFIX.json` names.

    Raises:
        UserError: the document, the tokenizer folder or `PREFIX.json` does not exist.
    """
    files, lengths, metadata = inspect(prefix), document_lengths(prefix), read_metadata(prefix)
    if not 0 <= number < len(lengths):
        raise UserError(f"--document {number}", f"{prefix} has {len(lengths):,} documents", "give a number from 0")
    if tokenizer is None and metadata is None:
        raise UserError("--tokenizer", f"is needed, because {prefix}.json is missing", "give the tokenizer folder")
    first = int(lengths[:number].sum(dtype=np.int64)) * files.dtype.itemsize
    ids = np.fromfile(f"{prefix}.bin", dtype=files.dtype, count=int(lengths[number]), offset=first)
    text: str = load_tokenizer(tokenizer or metadata.tokenizer).decode(ids.tolist())  # type: ignore[union-attr]
    return text
