"""Settings of the data."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from hypermoe_ds.config import LARGEST_COUNT, PathText, Settings
from hypermoe_ds.files import distinct_names


class DatasetConfig(Settings):
    """Token files and their share of the training samples."""

    prefix: PathText = Field(description="path of the token files of tools/preprocess_data.py, without .bin and .idx")
    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="what logs call the dataset; null takes the last part of the prefix, or as many as tell it apart",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1e9,
        description="share of the training samples drawn from here, relative to the other sources' weights; "
        "validation goes through every source once, whatever its weight",
    )


def dataset_names(sources: Sequence[DatasetConfig]) -> list[str]:
    """Return a distinct name for each dataset: its own, or the shortest end of its prefix that no other one has.

    Parts of a path are joined by `-`, since a `/` separates the parts of a metric's key. Datasets that still share a
    name, such as the same files twice, are numbered: `books`, `books-2`.
    """
    paths = [(source.name.replace("/", "-"),) if source.name else Path(source.prefix).parts for source in sources]
    return distinct_names(paths, "-", "{}-{}")


class DataConfig(Settings):
    """What to train and validate on."""

    train: list[DatasetConfig] = Field(min_length=1, description="sources of the training samples")
    valid: list[DatasetConfig] = Field(default=[], description="sources of the validation samples; empty: none")
    sequence_length: int = Field(gt=0, le=LARGEST_COUNT, description="tokens in a sample")
    tokenizer: PathText = Field(description="Hugging Face tokenizer folder that the token files were made with")
    # tiny-10m on two ranks and 2 cores, three times in turn: 4,266 to 4,593 tokens/s with 0, 4,278 to 4,646 with 2.
    # Steps of 30 ms are some 10 % slower with 2; a GPU, whose host launches kernels, is what it is for.
    workers: int = Field(
        default=2, ge=0, le=1024, description="processes per rank that load samples; 0: the rank itself"
    )
    cache: PathText | None = Field(
        default=None,
        description="folder for the indices of the samples, visible to all nodes; "
        "null means `cache` beside the files of the first training source",
    )

    @property
    def cache_folder(self) -> str:
        """The folder for the indices of the samples."""
        return self.cache or str(Path(self.train[0].prefix).parent / "cache")
