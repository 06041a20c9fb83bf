"""Count how much of each dataset a run has consumed."""

from collections.abc import Sequence

import numpy as np

from hypermoe_ds.data.datasets import SequenceDataset
from hypermoe_ds.data.shares import DatasetShare
from hypermoe_ds.data.skipped_samples import SkippedSamples

_CHUNK = 1 << 24  # number of samples counted at once; each sample takes 8 bytes


class Consumption:
    """Count consumed tokens and epochs per dataset.

    Each call of `at` counts only the samples since the previous call.

    Args:
        samples: the training samples.
        datasets: the training datasets, in recipe order.
        sequence_length: number of tokens per sample.
        skipped_samples: samples that the run skips.
    """

    def __init__(
        self,
        samples: SequenceDataset,
        datasets: Sequence[DatasetShare],
        sequence_length: int,
        skipped_samples: SkippedSamples,
    ) -> None:
        self._samples = samples
        self._datasets = datasets
        self._sequence_length = sequence_length
        self._skipped_samples = skipped_samples
        self._counts = np.zeros(len(datasets), dtype=np.int64)
        self._counted = 0

    def at(self, consumed_samples: int) -> dict[str, float]:
        """Return the metrics `consumed_tokens`, `consumed_tokens/DATASET` and `epochs/DATASET`.

        Args:
            consumed_samples: position in the data order, including skipped samples.
        """
        for first in range(self._counted, consumed_samples, _CHUNK):
            end = min(first + _CHUNK, consumed_samples)
            for begin, stop in self._skipped_samples.kept_ranges(first, end):
                self._counts += self._samples.count_by_dataset(begin, stop, len(self._datasets))
        self._counted = max(self._counted, consumed_samples)
        tokens = [int(count) * self._sequence_length for count in self._counts]
        values: dict[str, float] = {"consumed_tokens": sum(tokens)}
        for dataset, count in zip(self._datasets, tokens, strict=True):
            values[f"consumed_tokens/{dataset.name}"] = count
            values[f"epochs/{dataset.name}"] = count / dataset.tokens
        return values
