"""Cut the token stream of one dataset into samples, shuffled anew in each epoch."""

from hashlib import blake2b
from typing import Any

import numpy as np

from hypermoe_ds.data.megatron import IndexedDataset
from hypermoe_ds.data.permutation import Permutation
from hypermoe_ds.data.token_files import TokenFiles


class DatasetSamples:
    """The samples of a dataset, in an endless sequence of epochs.

    A sample is a slice of the token stream, so it may begin and end within a document. The samples of each epoch are
    shuffled. They contain every token once, except for up to `sequence_length` tokens that do not fill a sample. In
    each epoch, a random part of these tokens is left out at the beginning of the stream and the rest at its end. No
    token is therefore left out in every epoch, and the samples of different epochs begin at different tokens.

    Args:
        files: the token files.
        sequence_length: number of tokens per sample.
        seed: number that selects the order, together with `key`.
        key: text that identifies the dataset.

    Attributes:
        files: the token files.
        sequence_length: number of tokens per sample.
        per_epoch: number of samples per epoch.

    Raises:
        UserError: there are too few tokens for one sample.
    """

    def __init__(self, files: TokenFiles, sequence_length: int, seed: int, key: str) -> None:
        self.files = files
        self.sequence_length = sequence_length
        self.per_epoch = files.samples_per_epoch(sequence_length)
        self._key = f"{seed} {sequence_length} {key}"
        self._tokens = IndexedDataset(files.prefix)
        self._epoch = -1

    def tokens(self, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the tokens of a sample and the token after them, [sequence_length + 1]."""
        start = self.start(number) * self.files.dtype.itemsize
        read = self._tokens.bin_reader.read(dtype=self.files.dtype, count=self.sequence_length + 1, offset=start)
        return np.asarray(read, dtype=np.int64)

    def start(self, number: int) -> int:
        """Return the position of a sample's first token in the token stream."""
        epoch, position = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._begin_epoch(epoch)
        return self._shift + self._order(position) * self.sequence_length

    def documents(self, number: int) -> range:
        """Return the numbers of the documents that contain a sample's tokens or the token after them."""
        first = self.start(number)
        positions = np.array([first, first + self.sequence_length]) * self.files.dtype.itemsize
        begin, end = np.searchsorted(self._tokens.index.sequence_pointers, positions, side="right")
        return range(int(begin) - 1, int(end))

    def _begin_epoch(self, epoch: int) -> None:
        key = f"{self._key} epoch {epoch}"
        rest = self.files.tokens - 1 - self.per_epoch * self.sequence_length
        drawn = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
        self._shift, self._order, self._epoch = drawn % (rest + 1), Permutation(self.per_epoch, key), epoch
