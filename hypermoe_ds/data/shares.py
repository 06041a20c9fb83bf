"""Describe how much of each dataset a run reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetShare:
    """The share of a training dataset in a run.

    Attributes:
        name: name of the dataset in logs.
        tokens: size of the dataset in tokens.
        weight: the dataset's share of the run's training tokens, from 0 to 1.
        epochs: number of times that the run reads the dataset.
    """

    name: str
    tokens: int
    weight: float
    epochs: float
