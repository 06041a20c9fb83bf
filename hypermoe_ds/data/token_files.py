"""Token files of a dataset: `PREFIX.bin` (token ids), `PREFIX.idx` (document lengths) and `PREFIX.json` (metadata)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.data.tokenizer import vocabulary_file
from hypermoe_ds.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("documents", "<u8")]
)  # packed struct of 34 bytes
_TOKEN_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
_SCANNED_TOKENS = 1 << 24
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
_CHUNK = 1 << 20
_AGAIN = "run tools/preprocess_data.py again"


@dataclass(frozen=True)
class Metadata:
    """Metadata of token files, stored in `PREFIX.json`.

    Attributes:
        vocab_size: largest token id of the tokenizer plus 1.
        eos_id: id of the token that ends each document.
        tokenizer: folder of the tokenizer.
        tokenizer_file: name of the tokenizer's vocabulary file.
        tokenizer_sha256: SHA-256 of the vocabulary file, hexadecimal.
        documents: number of documents.
        tokens: number of tokens, including end-of-document tokens.
        text_bytes: size of the text in UTF-8 bytes.
        encoding_sha256: SHA-256 of the token ids of a probe text, hexadecimal; an empty string in older files.
        bin_digest: `content_digest` of `PREFIX.bin`; an empty string in older files.
        bin_sha256: SHA-256 of `PREFIX.bin`, hexadecimal; an empty string in older files.
        idx_sha256: SHA-256 of `PREFIX.idx`, hexadecimal; an empty string in older files.
        inputs: path, size in bytes and `content_digest` of each input file, in order; empty in older files.
        options: how the inputs were read; empty in older files.
        versions: git commit and package versions; empty in older files.
    """

    vocab_size: int
    eos_id: int
    tokenizer: str
    tokenizer_file: str
    tokenizer_sha256: str
    documents: int
    tokens: int
    text_bytes: int
    encoding_sha256: str = ""
    bin_digest: str = ""
    bin_sha256: str = ""
    idx_sha256: str = ""
    inputs: list[dict[str, str | int]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        """Mean number of text bytes per token, including end-of-document tokens, which have no text."""
        return self.text_bytes / self.tokens

    def write(self, path: Path) -> None:
        """Write the metadata as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class TokenFiles:
    """A `.bin` file and an `.idx` file that were checked for consistency.

    Attributes:
        prefix: path of the files without suffix.
        dtype: NumPy type of a token in the `.bin` file.
        tokens: number of tokens.
        digest: `content_digest` of the `.bin` file.
    """

    prefix: str
    dtype: np.dtype[Any]
    tokens: int
    digest: str

    def largest_token(self) -> int:
        """Return the largest token id among the first 16,777,216 tokens."""
        return int(np.fromfile(f"{self.prefix}.bin", dtype=self.dtype, count=_SCANNED_TOKENS).max())

    def samples_per_epoch(self, sequence_length: int) -> int:
        """Return the number of complete samples. The token after a sample is needed as the sample's last label.

        Raises:
            UserError: there are too few tokens for one sample.
        """
        if self.tokens <= sequence_length:
            problem = f"has {self.tokens} tokens, but one sample needs {sequence_length + 1}"
            raise UserError(self.prefix, problem, "lower data.sequence_length or preprocess more text")
        return (self.tokens - 1) // sequence_length

    def last_token(self) -> int:
        """Return the last token id."""
        start = (self.tokens - 1) * self.dtype.itemsize
        return int(np.fromfile(f"{self.prefix}.bin", dtype=self.dtype, count=1, offset=start)[0])


def write_index(path: Path, dtype: type[np.int32 | np.uint16], lengths: Sequence[Path], documents: int) -> None:
    """Write the index of a token file, as megatron-core's `IndexedDatasetBuilder` does, but in constant memory.

    Args:
        path: the `.idx` file to write.
        dtype: NumPy type of the tokens.
        lengths: files that contain the number of tokens of each document as int32, in order.
        documents: total number of documents.
    """
    code = next(code for code, each in _TOKEN_DTYPES.items() if each == np.dtype(dtype))
    with path.open("wb") as index:
        index.write(np.array((_MAGIC, 1, code, documents, documents + 1), dtype=_HEADER).tobytes())
        for part in _chunks(lengths):
            index.write(part.tobytes())
        offset = 0
        for part in _chunks(lengths):
            ends = offset + np.cumsum(part, dtype=np.int64) * np.dtype(dtype).itemsize
            index.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
            offset = int(ends[-1])
        for first in range(0, documents + 1, _CHUNK):
            index.write(np.arange(first, min(first + _CHUNK, documents + 1), dtype=np.int64).tobytes())


def _chunks(paths: Sequence[Path]) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    for path in paths:
        with path.open("rb") as file:
            while len(part := np.fromfile(file, dtype=np.int32, count=_CHUNK)):
                yield part


def check_files(config: DataConfig) -> None:
    """Check that the tokenizer folder and all token files exist, without reading their content.

    Raises:
        UserError: a file is missing; the message names the first missing file.
    """
    vocabulary_file(config.tokenizer)
    for dataset in config.all_datasets():
        _paths(dataset.prefix)


def _paths(prefix: str) -> tuple[Path, Path]:
    """Return the paths of the index file and the data file of `prefix`.

    Raises:
        UserError: a file is missing.
    """
    index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index_path, data_path):
        if not path.is_file():
            raise UserError(str(path), "no such file", "check the prefix, or run tools/preprocess_data.py")
    return index_path, data_path


def inspect(prefix: str) -> TokenFiles:
    """Check that the `.bin` and `.idx` files of `prefix` are complete and match.

    Raises:
        UserError: a file is missing, truncated or not a token file.
    """
    index_path, data_path = _paths(prefix)
    try:
        return _inspect(prefix, index_path, data_path)
    except OSError as error:
        raise UserError(str(error.filename or prefix), f"cannot be read ({error.strerror})", "check the file") from None


def _inspect(prefix: str, index_path: Path, data_path: Path) -> TokenFiles:
    size = index_path.stat().st_size
    if size < _HEADER.itemsize:
        raise UserError(str(index_path), f"is truncated ({size} bytes)", _AGAIN)
    header = np.fromfile(index_path, dtype=_HEADER, count=1)[0]
    # NumPy strips trailing zeros from byte strings.
    if header["magic"] != _MAGIC.rstrip(b"\0") or header["version"] != 1 or int(header["dtype"]) not in _TOKEN_DTYPES:
        raise UserError(
            str(index_path), "is not a token index", "give the prefix of files written by tools/preprocess_data.py"
        )
    sequences, documents = int(header["sequences"]), int(header["documents"])
    expected = _HEADER.itemsize + 12 * sequences + 8 * documents
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise UserError(str(index_path), f"is {kind} ({size} bytes instead of {expected})", _AGAIN)
    dtype = _TOKEN_DTYPES[int(header["dtype"])]
    tokens = _tokens(index_path, dtype, sequences)
    size, expected = data_path.stat().st_size, tokens * dtype.itemsize
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise UserError(str(data_path), f"is {kind} ({size} bytes instead of {expected})", _AGAIN)
    if tokens == 0:
        raise UserError(str(data_path), "has no tokens", _AGAIN)
    return TokenFiles(prefix, dtype, tokens, content_digest(data_path))


def _tokens(index_path: Path, dtype: np.dtype[Any], sequences: int) -> int:
    """Return the number of tokens, computed from the index entry of the last document only."""
    if sequences == 0:
        return 0
    with index_path.open("rb") as index:
        index.seek(_HEADER.itemsize + 4 * (sequences - 1))
        length = np.fromfile(index, dtype=np.int32, count=1)[0]
        index.seek(_HEADER.itemsize + 12 * sequences - 8)
        start = np.fromfile(index, dtype=np.int64, count=1)[0]
    return int(start) // dtype.itemsize + int(length)


def content_digest(path: Path) -> str:
    """Return a hexadecimal hash of a file's size and of up to 64 evenly spaced blocks of 64 KiB.

    At most 4 MiB are read, so every launch can use the digest to detect a replaced file. Only a hash of the whole file
    is certain to detect changes of single bytes.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(size - _BLOCK_BYTES, 0)
    with path.open("rb") as file:
        for offset in sorted({last * number // (_SAMPLED_BLOCKS - 1) for number in range(_SAMPLED_BLOCKS)}):
            file.seek(offset)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def document_lengths(prefix: str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Return the number of tokens of each document of token files that `inspect` has checked."""
    path = Path(f"{prefix}.idx")
    count = int(np.fromfile(path, dtype=_HEADER, count=1)[0]["sequences"])
    return np.fromfile(path, dtype=np.int32, count=count, offset=_HEADER.itemsize)


def read_metadata(prefix: str) -> Metadata | None:
    """Read `PREFIX.json`; return None if the file does not exist.

    Raises:
        UserError: the file was not written by tools/preprocess_data.py.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        return Metadata(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(str(path), f"is not metadata of token files ({error})", f"remove it, or {_AGAIN}") from None
