"""How much of each dataset a run reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetShare:
    """Share of a training dataset in a run.

    Attributes:
        name: name in logs.
        tokens: size of the dataset in tokens.
        weight: share of the run's training tokens, 0 to 1.
        epochs: number of times that the run reads the dataset.
    """

    name: str
    tokens: int
    weight: float
    epochs: float
