"""Encode a sample of the inputs to check whether a tokenizer loses text and to estimate the number of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from hypermoe_ds.data.encoding import Encoder
from hypermoe_ds.data.inputs import InputFile
from hypermoe_ds.data.readers import DocumentReader, LongText, ReadOptions, utf8_bytes

_FILES = 16
_DOCUMENTS_PER_FILE = 16
_CHARACTERS = 1 << 14


@dataclass(frozen=True)
class TokenizerCheck:
    """Result of encoding and decoding a sample of documents.

    Attributes:
        documents: number of documents.
        changed: number of documents that decoding does not restore exactly.
        text_bytes: size of the documents in UTF-8 bytes.
        tokens: number of tokens.
        unknown: number of unknown tokens.
    """

    documents: int = 0
    changed: int = 0
    text_bytes: int = 0
    tokens: int = 0
    unknown: int = 0

    def describe_loss(self) -> str:
        """Describe lost text in one line, or return an empty string if no text was lost."""
        if not self.changed and not self.unknown:
            return ""
        return (
            f"warning: the tokenizer loses text: in a sample, {self.changed:,} of {self.documents:,} documents change "
            f"when they are encoded and decoded, and {self.unknown / max(self.tokens, 1):.2%} of the tokens are unknown"
        )

    def tokens_per_byte(self) -> float:
        """Return the number of tokens per byte of text, or 1 if the sample has no text."""
        return self.tokens / self.text_bytes if self.text_bytes else 1.0


def check_tokenizer(encoder: Encoder, files: Sequence[InputFile], options: ReadOptions) -> TokenizerCheck:
    """Encode and decode the first 16,384 characters of up to 16 documents in each of up to 16 files.

    The files are evenly spaced among the inputs.
    """
    check = TokenizerCheck()
    for file in files[:: -(-len(files) // _FILES)]:
        reader = DocumentReader(file, replace(options, strict=False), lambda _: None)
        for document in islice(reader, _DOCUMENTS_PER_FILE):
            piece = next(document.pieces()) if isinstance(document, LongText) else document
            check = _add(check, encoder, piece[:_CHARACTERS])
    return check


def _add(check: TokenizerCheck, encoder: Encoder, text: str) -> TokenizerCheck:
    tokens = np.concatenate([ids for ids, _ in encoder.encode([text])])
    return TokenizerCheck(
        documents=check.documents + 1,
        changed=check.changed + (encoder.decode(tokens[:-1]) != text),
        text_bytes=check.text_bytes + utf8_bytes(text),
        tokens=check.tokens + len(tokens),
        unknown=check.unknown + int((tokens == encoder.unk_id).sum()),
    )
