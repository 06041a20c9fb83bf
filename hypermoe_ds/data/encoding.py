"""Encode documents into token ids, in this process."""

from functools import cache

import numpy as np
import numpy.typing as npt

from hypermoe_ds.data.tokenizer import encode_as_text, encoding_digest, load_tokenizer

Tokens = npt.NDArray[np.int32 | np.uint16]


class Encoder:
    """Encode documents with a tokenizer folder.

    Attributes:
        vocab_size: number of tokens, including added ones.
        eos_id: the token that ends each document.
        digest: SHA-256 of the ids of a probe text.
        dtype: NumPy type for token ids: uint16 if the vocabulary is below 65,500, else int32.

    Raises:
        UserError: the folder has no tokenizer with an end-of-sequence token.
    """

    def __init__(self, folder: str) -> None:
        from hypermoe_ds.data.megatron import DType  # noqa: PLC0415 (takes seconds, so after the checks of the inputs)

        self._tokenizer = load_tokenizer(folder)
        self.vocab_size: int = len(self._tokenizer)
        self.eos_id: int = self._tokenizer.eos_token_id
        self.digest = encoding_digest(self._tokenizer)
        self.dtype: type[np.int32 | np.uint16] = DType.optimal_dtype(self.vocab_size)

    def encode(self, document: str) -> Tokens:
        """Return the token ids of a document [tokens + 1]; the last one is the end of the document.

        Control tokens in the text are encoded as text, so a document that contains "</s>" does not end there.
        """
        return np.array([*encode_as_text(self._tokenizer, document), self.eos_id], dtype=self.dtype)


@cache
def encoder_for(folder: str, sha256: str) -> Encoder:
    """Return the encoder of a folder whose vocabulary has this checksum; it is loaded once and inherited by forks."""
    return Encoder(folder)


def encode_batch(folder: str, sha256: str, documents: list[str]) -> list[Tokens]:
    """Return the token ids of each document."""
    return [encoder_for(folder, sha256).encode(document) for document in documents]
