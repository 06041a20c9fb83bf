"""Count how much of each dataset a run has consumed."""

from collections import Counter

from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.data.training_set import TrainingSet


class Consumption:
    """Count consumed tokens and epochs per dataset.

    Each call of `at` counts only the samples since the previous call.

    Args:
        samples: the training samples.
        skipped_samples: samples that the run skips.
    """

    def __init__(self, samples: TrainingSet, skipped_samples: SkippedSamples) -> None:
        self._samples = samples
        self._sizes = {dataset.name: dataset.tokens for dataset in samples.shares()}
        self._skipped_samples = skipped_samples
        self._tokens = Counter(samples.tokens_before(0))
        self._counted = 0

    def at(self, consumed_samples: int) -> dict[str, float]:
        """Return the metrics `consumed_tokens`, `consumed_tokens/DATASET` and `epochs/DATASET`.

        Args:
            consumed_samples: position in the data order, including skipped samples.
        """
        for begin, end in self._skipped_samples.kept_ranges(self._counted, consumed_samples):
            self._tokens.update(self._samples.tokens_before(end))
            self._tokens.subtract(self._samples.tokens_before(begin))
        self._counted = max(self._counted, consumed_samples)
        values: dict[str, float] = {"consumed_tokens": self._tokens.total()}
        for name, tokens in self._tokens.items():
            values[f"consumed_tokens/{name}"] = tokens
            if name in self._sizes:
                values[f"epochs/{name}"] = tokens / self._sizes[name]
        return values
