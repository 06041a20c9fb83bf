"""The unigram baseline: the loss of a language model without context."""

import numpy as np
from numpy.typing import NDArray

from hypermoe_ds.data.token_files import inspect
from hypermoe_ds.data.validation_set import ValidationSet


def count_tokens(prefixes: list[str], vocab_size: int) -> NDArray[np.int64]:
    """Return the number of occurrences of each token id in all token files, [vocab_size].

    Raises:
        UserError: a file is missing or truncated.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for prefix in prefixes:
        files = inspect(prefix)
        tokens = np.memmap(f"{prefix}.bin", dtype=files.dtype, mode="r")
        for start in range(0, files.tokens, _CHUNK):
            counts += np.bincount(tokens[start : start + _CHUNK], minlength=vocab_size)
    return counts


def unigram_loss(train_counts: NDArray[np.int64], dataset: ValidationSet) -> float:
    """Return the cross-entropy of the labels of `dataset` in nats per token, under add-one smoothed frequencies.

    Args:
        train_counts: number of occurrences of each token id in the training data, [vocab_size].
        dataset: the validation samples.
    """
    probability = (train_counts + 1) / (train_counts.sum() + train_counts.size)
    labels = np.concatenate([dataset[index]["labels"].numpy() for index in range(len(dataset))])
    return float(-np.log(probability[labels]).mean())


_CHUNK = 1 << 24
