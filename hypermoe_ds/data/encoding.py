"""Encode documents as token ids in the current process."""

from functools import cache

import numpy as np
import numpy.typing as npt

from hypermoe_ds.data.tokenizer import encode_as_text, encoding_digest, load_tokenizer

Tokens = npt.NDArray[np.int32 | np.uint16]


class Encoder:
    """Encode documents with a tokenizer folder.

    Attributes:
        vocab_size: number of tokens, including added tokens.
        eos_id: id of the token that ends each document.
        digest: SHA-256 of the token ids of a probe text.
        dtype: NumPy type for token ids: uint16 for vocabularies below 65,500 tokens, otherwise int32.

    Raises:
        UserError: the folder has no tokenizer with an end-of-sequence token.
    """

    def __init__(self, folder: str) -> None:
        from hypermoe_ds.data.megatron import DType  # noqa: PLC0415 (takes seconds, so check the inputs first)

        self._tokenizer = load_tokenizer(folder)
        self.vocab_size: int = len(self._tokenizer)
        self.eos_id: int = self._tokenizer.eos_token_id
        self.digest = encoding_digest(self._tokenizer)
        self.dtype: type[np.int32 | np.uint16] = DType.optimal_dtype(self.vocab_size)

    def encode(self, document: str) -> Tokens:
        """Return the token ids of a document followed by the end-of-sequence token, [tokens + 1].

        Control tokens in the text are encoded as ordinary text, so "</s>" inside a document does not end the document.
        """
        return np.array([*encode_as_text(self._tokenizer, document), self.eos_id], dtype=self.dtype)


@cache
def encoder_for(folder: str, sha256: str) -> Encoder:
    """Return the encoder of a tokenizer folder. Each encoder is loaded once per checksum and inherited by forks."""
    return Encoder(folder)


def encode_batch(folder: str, sha256: str, documents: list[str]) -> list[Tokens]:
    """Return the token ids of each document."""
    return [encoder_for(folder, sha256).encode(document) for document in documents]
