"""Encode documents as token ids in the current process."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hypermoe_ds.data.long_documents import LongEncoder
from hypermoe_ds.data.readers import Document, LongText
from hypermoe_ds.data.tokenizer import embeddings_needed, encode_as_text, encoding_digest, load_tokenizer

Tokens = npt.NDArray[np.int32 | np.uint16]
# Encoding a text of this length takes 125 MB (measured). Longer texts are encoded in windows. Encoding in windows takes
# less memory but twice the time, because the offsets of the tokens are also computed.
LONG_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 18


class Encoder:
    """Encode documents with the tokenizer in a folder.

    Control tokens in the text are encoded as ordinary text, so "</s>" inside a document does not end the document.

    Attributes:
        vocab_size: largest token id plus 1.
        eos_id: id of the token that ends each document.
        unk_id: id of the token that stands for unknown text; None if the tokenizer has no such token.
        digest: SHA-256 of the token ids of a probe text.
        dtype: NumPy type for token ids: uint16 for vocabularies below 65,500 tokens, otherwise int32.

    Raises:
        UserError: the folder has no tokenizer with an end-of-sequence token.
    """

    def __init__(self, folder: str) -> None:
        from hypermoe_ds.data.megatron import DType  # noqa: PLC0415 (takes seconds, so the inputs are checked first)

        self._tokenizer = load_tokenizer(folder)
        self.vocab_size = embeddings_needed(self._tokenizer)
        self.eos_id: int = self._tokenizer.eos_token_id
        self.unk_id: int | None = self._tokenizer.unk_token_id
        self.digest = encoding_digest(self._tokenizer)
        self.dtype: type[np.int32 | np.uint16] = DType.optimal_dtype(self.vocab_size)
        self._fast: Any = self._tokenizer.backend_tokenizer if self._tokenizer.is_fast else None
        if self._fast is not None:
            self._fast.encode_special_tokens = True
            self._fast.no_truncation()
            self._fast.no_padding()
        self._long = LongEncoder(self._fast) if self._fast is not None else None

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[Tokens, bool]]:
        """Encode documents, in order, with an end-of-sequence token after each document.

        Yields:
            Token ids, and whether they end a document. Only long documents are yielded in several parts.

        Raises:
            LostDocumentError: a long document can no longer be read.
        """
        batch: list[str] = []
        characters = 0
        for document in documents:
            if isinstance(document, LongText) or len(document) > LONG_CHARACTERS:
                yield from self._encode_batch(batch)
                yield from self._encode_long(document)
                batch, characters = [], 0
                continue
            batch.append(document)
            characters += len(document)
            if len(batch) == _BATCH_DOCUMENTS or characters > _BATCH_CHARACTERS:
                yield from self._encode_batch(batch)
                batch, characters = [], 0
        yield from self._encode_batch(batch)

    @property
    def token_bytes(self) -> int:
        """Size of a token id in bytes."""
        return np.dtype(self.dtype).itemsize

    def decode(self, tokens: Tokens) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False))

    def _encode_batch(self, documents: list[str]) -> Iterator[tuple[Tokens, bool]]:
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(documents, add_special_tokens=False)
            ids = (encoding.ids for encoding in encodings)
        else:
            ids = (encode_as_text(self._tokenizer, document) for document in documents)
        for each in ids:
            tokens = np.empty(len(each) + 1, dtype=self.dtype)
            tokens[:-1], tokens[-1] = each, self.eos_id
            yield tokens, True

    def _encode_long(self, document: Document) -> Iterator[tuple[Tokens, bool]]:
        pieces = document.pieces() if isinstance(document, LongText) else [document]
        if self._long is None:
            yield from self._encode_batch(["".join(pieces)])
            return
        for ids in self._long.encode(pieces):
            yield ids.astype(self.dtype), False
        yield np.array([self.eos_id], dtype=self.dtype), True


@cache
def encoder_for(folder: str, sha256: str) -> Encoder:
    """Return the encoder of a tokenizer folder; it is loaded once per checksum, and forked processes inherit it."""
    return Encoder(folder)
