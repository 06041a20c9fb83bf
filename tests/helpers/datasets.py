"""Build training sets from a recipe's data settings, as a training job does, and read their samples."""

from typing import Any, Protocol

import torch

from hypermoe_ds.config import validate
from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.data.stage_start import StageStart
from hypermoe_ds.data.training_set import TrainingSet, build_training_set
from tests.helpers.corpus import TokenisedCorpus


class _Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


def data_config(corpus: TokenisedCorpus, **changes: Any) -> DataConfig:
    """Return data settings for samples of 64 tokens from the corpus, updated with `changes`."""
    values = {
        "train": [{"prefix": corpus.train}],
        "valid": [{"prefix": corpus.valid}],
        "sequence_length": 64,
        "tokenizer": str(corpus.tokenizer),
        **changes,
    }
    return validate(DataConfig, values, "recipe")


def training_set(
    config: DataConfig,
    length: int,
    seed: int = 1,
    resumed: StageStart | None = None,
    consumed: int = 0,
    batch: int = 1,
) -> TrainingSet:
    """Build the training set of a run that has consumed samples in steps of `batch` samples."""
    step = consumed // batch
    stages = config.all_stages()
    current = max(number for number, stage in enumerate(stages) if stage.from_step <= step + 1)
    plan = [(consumed, stages[current])]
    plan += [((stage.from_step - 1) * batch, stage) for stage in stages[current + 1 :]]
    return build_training_set(config, seed, plan, length, resumed)


def rows(samples: _Samples, count: int | None = None, first: int = 0) -> list[tuple[int, ...]]:
    """Return each sample as a tuple of its tokens and the token that follows them."""
    read = [samples[index] for index in range(first, len(samples) if count is None else first + count)]
    return [(*sample["tokens"].tolist(), int(sample["labels"][-1])) for sample in read]
