"""Describe where a stage of the training data begins and what was read before it, for storage in checkpoints."""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hypermoe_ds.data.blend import Blend

_Count = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True)
class StageStart:
    """The beginning of a stage, as stored in checkpoints.

    Attributes:
        first: index of the stage's first sample.
        seed: seed of the sample order.
        sequence_length: number of tokens per sample.
        indices_per_sample: how many indices of the training set stand for one sample.
        weights: weight of each dataset, by content digest, in the order of the recipe; the weights sum to 1.
        consumed: number of samples read before the stage, by `CONTENT_DIGEST/SEQUENCE_LENGTH`.
    """

    first: _Count
    seed: _Count
    sequence_length: Annotated[int, Field(gt=0, strict=True)]
    indices_per_sample: Annotated[int, Field(gt=0, strict=True)]
    weights: dict[str, float]
    consumed: dict[str, _Count]

    def consumed_at(self, index: int) -> dict[str, int]:
        """Return the value of `consumed` for the next stage, which begins at `index`."""
        counts = Blend(list(self.weights.values())).counts(-(-(index - self.first) // self.indices_per_sample))
        added = {f"{key}/{self.sequence_length}": int(count) for key, count in zip(self.weights, counts, strict=True)}
        return dict(Counter(self.consumed) + Counter(added))

    def differences(self, other: "StageStart") -> list[str]:
        """Return the names of the settings in which two stages differ, apart from where the stages begin."""
        names = {"seed": "train.seed", "sequence_length": "data.sequence_length"}
        found = [name for key, name in names.items() if getattr(self, key) != getattr(other, key)]
        if list(self.weights) != list(other.weights):
            found.append("the datasets of data.train or their content")
        elif self.weights != other.weights:
            found.append("the weights of data.train")
        return found
