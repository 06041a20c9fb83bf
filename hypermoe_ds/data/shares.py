"""Compute how much of each dataset a run reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypermoe_ds.data.settings import DatasetConfig, dataset_names
from hypermoe_ds.data.token_files import inspect


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


def dataset_shares(datasets: Sequence[DatasetConfig], trained_tokens: int) -> list[DatasetShare]:
    """Return the share of each dataset in a run of `trained_tokens` tokens.

    Raises:
        UserError: a token file is missing or truncated.
    """
    tokens = [inspect(dataset.prefix).tokens for dataset in datasets]
    return shares(dataset_names(datasets), tokens, [dataset.weight for dataset in datasets], trained_tokens)


def shares(
    names: Sequence[str], tokens: Sequence[int], weights: Sequence[float], trained_tokens: int
) -> list[DatasetShare]:
    """Divide a run's tokens among datasets by weight, with epochs = trained tokens * share / dataset tokens."""
    total = sum(weights)
    return [
        DatasetShare(name, size, weight / total, trained_tokens * weight / total / size)
        for name, size, weight in zip(names, tokens, weights, strict=True)
    ]
