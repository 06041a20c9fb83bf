"""How much of each dataset a run has consumed."""

from collections.abc import Sequence

import numpy as np

from hypermoe_ds.data.datasets import SequenceDataset
from hypermoe_ds.data.left_out import LeftOut
from hypermoe_ds.data.settings import DataSource, dataset_names
from hypermoe_ds.data.token_files import inspect

_CHUNK = 1 << 24  # samples counted at once: counting takes 8 bytes each


class Consumption:
    """Count consumed tokens and epochs, by dataset.

    Counts go on from those of the last call, so a call takes time for the samples since then alone.

    Args:
        samples: the training samples.
        sources: their datasets.
        sequence_length: tokens of a sample.
        left_out: samples that are skipped.

    Raises:
        UserError: a token file is missing or truncated.
    """

    def __init__(
        self, samples: SequenceDataset, sources: Sequence[DataSource], sequence_length: int, left_out: LeftOut
    ) -> None:
        self._samples = samples
        self._names = dataset_names(sources)
        self._sizes = [inspect(source.prefix).tokens for source in sources]
        self._sequence_length = sequence_length
        self._left_out = left_out
        self._counts = np.zeros(len(sources), dtype=np.int64)
        self._counted = 0

    def at(self, consumed_samples: int) -> dict[str, float]:
        """Return `consumed_tokens`, and `consumed_tokens/DATASET` and `epochs/DATASET`, after so many samples.

        Args:
            consumed_samples: position in the order of the samples, skipped ones counted.
        """
        for first in range(self._counted, consumed_samples, _CHUNK):
            end = min(first + _CHUNK, consumed_samples)
            for begin, stop in self._left_out.kept_ranges(first, end):
                self._counts += self._samples.count_by_dataset(begin, stop, len(self._names))
        self._counted = max(self._counted, consumed_samples)
        tokens = [int(count) * self._sequence_length for count in self._counts]
        values: dict[str, float] = {"consumed_tokens": sum(tokens)}
        values |= {f"consumed_tokens/{name}": count for name, count in zip(self._names, tokens, strict=True)}
        epochs = zip(self._names, tokens, self._sizes, strict=True)
        return values | {f"epochs/{name}": count / size for name, count, size in epochs}
