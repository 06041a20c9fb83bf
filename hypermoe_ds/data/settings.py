"""Settings of the section `data`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field

from hypermoe_ds.config import LARGEST_COUNT, PathText, Settings
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import distinct_names


class DatasetConfig(Settings):
    """A dataset: token files and their weight in training."""

    prefix: PathText = Field(description="path of token files from tools/preprocess_data.py, without .bin and .idx")
    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="name of the dataset in logs; null uses the shortest unique suffix of the prefix",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1e9,
        description="sampling weight in training, relative to those of the other datasets; ignored in validation, "
        "which reads every dataset once",
    )


def dataset_names(datasets: Sequence[DatasetConfig]) -> list[str]:
    """Return a distinct name for each dataset: the given name or the shortest unique suffix of its prefix.

    Path components are joined by `-`, because `/` separates the parts of a metric's key. If datasets still share a
    name, for example because their prefixes are equal, a number is appended: `books`, `books-2`.
    """
    paths = [(each.name.replace("/", "-"),) if each.name else Path(each.prefix).parts for each in datasets]
    return distinct_names(paths, "-", "{}-{}")


class StageConfig(Settings):
    """A stage of a run, which begins at a given step."""

    from_step: int = Field(ge=2, le=LARGEST_COUNT, description="first optimizer step of the stage, counted from 1")
    train: list[DatasetConfig] | None = Field(
        default=None, min_length=1, description="training datasets of the stage; null keeps those of the stage before"
    )
    sequence_length: int | None = Field(
        default=None,
        gt=0,
        le=LARGEST_COUNT,
        description="tokens per sample, a multiple of data.sequence_length; null keeps that of the stage before. The "
        "tokens per micro-batch stay the same",
    )


@dataclass(frozen=True)
class Stage:
    """A stage of a run with all its settings.

    Attributes:
        from_step: first optimizer step, counted from 1.
        train: the training datasets.
        sequence_length: number of tokens per sample.
    """

    from_step: int
    train: Sequence[DatasetConfig]
    sequence_length: int


class DataConfig(Settings):
    """Training and validation data."""

    train: list[DatasetConfig] = Field(min_length=1, description="training datasets")
    valid: list[DatasetConfig] = Field(default=[], description="validation datasets; empty means no validation")
    sequence_length: int = Field(gt=0, le=LARGEST_COUNT, description="tokens per sample")
    stages: list[StageConfig] = Field(
        default=[], description="later stages of the run, with other training datasets, weights or sequence lengths"
    )
    on_change: Literal["refuse", "continue"] = Field(
        default="refuse",
        description="what to do on a resume if the training datasets, their weights, data.sequence_length or "
        "train.seed have changed: stop with an error, or read each dataset from where the run left off",
    )
    document_mask: bool = Field(
        default=False,
        description="separate the documents in a sample: no token attends to another document, positions restart at 0, "
        "and the first token of a document is not predicted from the document before",
    )
    tokenizer: PathText = Field(description="folder of the Hugging Face tokenizer used to make the token files")
    # Speed of tiny-10m on two ranks and 2 cores, in three runs each: 4,266 to 4,593 tokens/s with 0 workers, 4,278 to
    # 4,646 tokens/s with 2 workers. On a CPU, steps of 30 ms are 10 % slower with 2 workers. The default is 2, because
    # the process of a rank on a GPU is busy launching kernels.
    workers: int = Field(
        default=2, ge=0, le=1024, description="data loader processes per rank; 0 loads data in the rank's own process"
    )

    def all_stages(self) -> list[Stage]:
        """Return all stages in order; the first stage begins at step 1."""
        stages = [Stage(1, self.train, self.sequence_length)]
        for stage in self.stages:
            before = stages[-1]
            length = stage.sequence_length or before.sequence_length
            stages.append(Stage(stage.from_step, stage.train or before.train, length))
        return stages

    def all_datasets(self) -> list[DatasetConfig]:
        """Return the datasets of all stages and the validation datasets, each prefix once."""
        training = [dataset for stage in self.all_stages() for dataset in stage.train]
        return list({dataset.prefix: dataset for dataset in [*training, *self.valid]}.values())

    def check_stages(self, micro_batch_size: int) -> None:
        """Check that the stages are in order and that whole samples fill each micro-batch.

        Raises:
            UserError: a stage is invalid.
        """
        for number, (before, stage) in enumerate(pairwise(self.all_stages())):
            where = f"data.stages.{number}"
            if stage.from_step <= before.from_step:
                problem = f"the stage before begins at step {before.from_step}"
                raise UserError(f"{where}.from_step={stage.from_step}", problem, "sort the stages by from_step")
            if stage.sequence_length % self.sequence_length:
                problem = f"is not a multiple of data.sequence_length={self.sequence_length}"
                raise UserError(f"{where}.sequence_length={stage.sequence_length}", problem, "choose a multiple")
            samples = stage.sequence_length // self.sequence_length
            if micro_batch_size % samples:
                problem = f"does not divide a micro-batch of {micro_batch_size} x {self.sequence_length} tokens"
                remedy = f"set train.micro_batch_size to a multiple of {samples}"
                raise UserError(f"{where}.sequence_length={stage.sequence_length}", problem, remedy)
