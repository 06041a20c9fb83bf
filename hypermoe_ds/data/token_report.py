"""Describe token files, decode their documents, and compare the files with the hashes in `PREFIX.json`."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from hypermoe_ds.data.token_files import Metadata, TokenFiles, document_lengths, inspect, read_metadata
from hypermoe_ds.data.tokenizer import load_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import sha256_of, writing_to

_PERCENTILES = (1, 50, 99)
_COUNTED_TOKENS = 1 << 24


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
    unknown = _unknown_tokens(prefix, files, metadata)
    if unknown is not None:
        read = min(files.tokens, _COUNTED_TOKENS)
        yield f"unknown tokens: {unknown:,} of the first {read:,} ({unknown / read:.2%})"
    if metadata.inputs:
        size = sum(int(each["bytes"]) for each in metadata.inputs)
        yield f"made from {len(metadata.inputs):,} files of {size:,} bytes, with {_listed(metadata.versions)}"


def _unknown_tokens(prefix: str, files: TokenFiles, metadata: Metadata) -> int | None:
    """Count the unknown tokens at the beginning; return None if the tokenizer is missing or has no unknown token."""
    if not Path(metadata.tokenizer).is_dir():
        return None
    unknown = load_tokenizer(metadata.tokenizer).unk_token_id
    if unknown is None:
        return None
    tokens = np.fromfile(f"{prefix}.bin", dtype=files.dtype, count=_COUNTED_TOKENS)
    return int((tokens == unknown).sum())


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version[:12]}" for name, version in versions.items())


def plot_lengths(prefix: str, path: str) -> None:
    """Plot a histogram of the lengths of the documents in tokens, on logarithmic axes, as a PNG image.

    Raises:
        UserError: the token files cannot be read, or the image cannot be written.
    """
    inspect(prefix)
    from matplotlib.figure import Figure  # noqa: PLC0415 (an optional dependency)

    lengths = document_lengths(prefix)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=np.geomspace(1, lengths.max() + 1, 50).tolist())
    axes.set(xscale="log", yscale="log", xlabel="tokens per document", ylabel="documents", title=prefix)
    with writing_to(Path(path)):
        figure.savefig(path, format="png", dpi=120)


def _percentiles(lengths: np.ndarray[tuple[int], np.dtype[np.int32]]) -> list[tuple[int, float]]:
    return list(zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES).tolist(), strict=True))


def bytes_to_verify(prefix: str) -> int:
    """Return the number of bytes that `verify` reads.

    Raises:
        UserError: see `verify`, except that hashes are not compared here.
    """
    _described(prefix)
    return sum(Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx"))


def verify(prefix: str, progress: Callable[[int], object]) -> None:
    """Compare the whole token files with the hashes in `PREFIX.json`.

    Args:
        prefix: path of the files without suffix.
        progress: function that is called with the number of bytes read since the last call.

    Raises:
        UserError: a file differs from the one that preprocessing wrote, or `PREFIX.json` has no hashes.
    """
    metadata = _described(prefix)
    for suffix, expected in ((".bin", metadata.bin_sha256), (".idx", metadata.idx_sha256)):
        if sha256_of(Path(f"{prefix}{suffix}"), progress) != expected:
            problem = f"differs from the file that preprocessing wrote (SHA-256 in {prefix}.json)"
            raise UserError(f"{prefix}{suffix}", problem, "restore it, or run tools/preprocess_data.py again")


def _described(prefix: str) -> Metadata:
    """Check token files and return their metadata, which must contain hashes."""
    inspect(prefix)
    metadata = read_metadata(prefix)
    if metadata is None or not metadata.bin_sha256:
        raise UserError(f"{prefix}.json", "has no hash of the token files", "run tools/preprocess_data.py again")
    return metadata


def document_text(prefix: str, number: int, tokenizer: str | None) -> str:
    """Decode a document, including its end-of-sequence token.

    Args:
        prefix: path of the files without suffix.
        number: index of the document, counted from 0.
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
