"""Settings of the section `data`."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from hypermoe_ds.config import LARGEST_COUNT, PathText, Settings
from hypermoe_ds.files import distinct_names


class DatasetConfig(Settings):
    """A dataset: token files and their weight in training."""

    prefix: PathText = Field(description="path of the token files of tools/preprocess_data.py, without .bin and .idx")
    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="name of the dataset in logs; null takes the end of the prefix that no other dataset has",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1e9,
        description="share of the training samples, relative to the weights of the other datasets; validation reads "
        "every dataset once, whatever its weight",
    )


def dataset_names(datasets: Sequence[DatasetConfig]) -> list[str]:
    """Return a distinct name for each dataset: its own, or the shortest end of its prefix that no other dataset has.

    Parts of a path are joined by `-`, because a `/` separates the parts of a metric's key. Datasets that still share a
    name, such as the same files twice, are numbered: `books`, `books-2`.
    """
    paths = [(each.name.replace("/", "-"),) if each.name else Path(each.prefix).parts for each in datasets]
    return distinct_names(paths, "-", "{}-{}")


class DataConfig(Settings):
    """Training and validation data."""

    train: list[DatasetConfig] = Field(min_length=1, description="training datasets")
    valid: list[DatasetConfig] = Field(default=[], description="validation datasets; empty means no validation")
    sequence_length: int = Field(gt=0, le=LARGEST_COUNT, description="tokens in a sample")
    tokenizer: PathText = Field(description="Hugging Face tokenizer folder that the token files were made with")
    # tiny-10m on two ranks and 2 cores, three runs each: 4,266 to 4,593 tokens/s with 0, 4,278 to 4,646 with 2. Steps
    # of 30 ms are 10 % slower with 2 on a CPU; on a GPU the host is busy with launching kernels.
    workers: int = Field(
        default=2, ge=0, le=1024, description="processes per rank that load samples; 0 loads in the rank itself"
    )
    cache: PathText | None = Field(
        default=None,
        description="folder for the sample indices, visible to all nodes; null means `cache` next to the files of the "
        "first training dataset",
    )

    @property
    def cache_folder(self) -> str:
        """The folder for the sample indices."""
        return self.cache or str(Path(self.train[0].prefix).parent / "cache")
