"""Settings of the section `data`."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from hypermoe_ds.config import LARGEST_COUNT, PathText, Settings
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


class DataConfig(Settings):
    """Training and validation data."""

    train: list[DatasetConfig] = Field(min_length=1, description="training datasets")
    valid: list[DatasetConfig] = Field(default=[], description="validation datasets; empty means no validation")
    sequence_length: int = Field(gt=0, le=LARGEST_COUNT, description="tokens per sample")
    tokenizer: PathText = Field(description="folder of the Hugging Face tokenizer used to make the token files")
    # Measured with tiny-10m on two ranks and 2 cores, three runs each: 4,266 to 4,593 tokens/s with 0 workers, 4,278 to
    # 4,646 tokens/s with 2 workers. On a CPU, 30 ms steps are 10 % slower with 2 workers. The default is 2, because
    # the process of a rank on a GPU is busy launching kernels.
    workers: int = Field(
        default=2, ge=0, le=1024, description="data loader processes per rank; 0 loads data in the rank's own process"
    )
    cache: PathText | None = Field(
        default=None,
        description="folder for the sample indices, shared by all nodes; null uses `cache` next to the files of the "
        "first training dataset",
    )

    @property
    def cache_folder(self) -> str:
        """Folder for the sample indices."""
        return self.cache or str(Path(self.train[0].prefix).parent / "cache")
