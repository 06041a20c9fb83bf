"""The validation samples of a dataset."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from hypermoe_ds.data.dataset_checks import check_datasets
from hypermoe_ds.data.samples import DatasetSamples
from hypermoe_ds.data.settings import DataConfig, DatasetConfig, dataset_names
from hypermoe_ds.data.token_files import inspect

_SEED = 0


class ValidationSet(Dataset[dict[str, torch.Tensor]]):
    """The first `length` samples of a dataset, in an order that depends only on the dataset and the sequence length.

    Args:
        samples: the samples of the dataset.
        length: number of samples; None selects one epoch, that is, every complete sequence once.
    """

    def __init__(self, samples: DatasetSamples, length: int | None = None) -> None:
        self._samples = samples
        self._length = samples.per_epoch if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `tokens` [S] and `labels` [S], both int64; `labels[t]` is the token after `tokens[t]`.

        Raises:
            IndexError: the index is outside the validation set.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        tokens = torch.from_numpy(self._samples.tokens(index))
        return {"tokens": tokens[:-1], "labels": tokens[1:]}

    def first(self, length: int) -> "ValidationSet":
        """Return a set of the first `length` samples."""
        return ValidationSet(self._samples, length)


def build_validation_sets(
    datasets: Sequence[DatasetConfig], sequence_length: int, max_samples: int | None
) -> dict[str, ValidationSet]:
    """Build the validation samples of each dataset, by name.

    Args:
        datasets: the validation datasets.
        sequence_length: number of tokens per sample.
        max_samples: approximate number of samples, divided among the datasets in proportion to their lengths, with at
            least one sample per dataset. None uses all samples.

    Raises:
        UserError: a token file is missing or damaged.
    """
    whole = {
        name: ValidationSet(DatasetSamples(inspect(dataset.prefix), sequence_length, _SEED, ""))
        for name, dataset in zip(dataset_names(datasets), datasets, strict=True)
    }
    total = sum(map(len, whole.values()))
    if max_samples is None or max_samples >= total:
        return whole
    return {name: part.first(max(max_samples * len(part) // total, 1)) for name, part in whole.items()}


def build_validation_set(prefix: str, tokenizer: str, sequence_length: int, vocab_size: int) -> ValidationSet:
    """Build the validation samples of one dataset, for use outside a training run.

    Args:
        prefix: path of the token files, without suffix.
        tokenizer: the tokenizer folder that the token files were made with.
        sequence_length: number of tokens per sample.
        vocab_size: number of token embeddings of the model.

    Raises:
        UserError: see `check_datasets`.
    """
    dataset = DatasetConfig(prefix=prefix)
    config = DataConfig(train=[dataset], valid=[dataset], sequence_length=sequence_length, tokenizer=tokenizer)
    check_datasets(config, vocab_size)
    [samples] = build_validation_sets([dataset], sequence_length, None).values()
    return samples
