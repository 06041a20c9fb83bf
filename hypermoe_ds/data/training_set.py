"""Define the order of the training samples: a sequence of stages, each of which blends datasets by weight.

The order up to any sample depends only on the stages up to that sample, never on the length of the run. The order is
not stored: every rank computes it from the settings.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from hypermoe_ds.data.blend import Blend
from hypermoe_ds.data.samples import DatasetSamples
from hypermoe_ds.data.settings import DataConfig, Stage, dataset_names
from hypermoe_ds.data.shares import DatasetShare
from hypermoe_ds.data.stage_start import StageStart
from hypermoe_ds.data.token_files import TokenFiles, inspect
from hypermoe_ds.errors import UserError


@dataclass(frozen=True)
class _StageSamples:
    start: StageStart
    datasets: Sequence[DatasetSamples]
    blend: Blend

    def locate(self, index: int) -> tuple[DatasetSamples, int]:
        """Return the dataset of the sample at `index` of the training set, and the sample's number in the dataset."""
        dataset, number = self.blend.locate((index - self.start.first) // self.start.indices_per_sample)
        digest = list(self.start.weights)[dataset]
        return self.datasets[dataset], number + self.start.consumed.get(f"{digest}/{self.start.sequence_length}", 0)

    def tokens_before(self, index: int) -> Iterator[tuple[str, int]]:
        """Yield the content digest of each dataset and the number of its tokens that the stage reads before `index`."""
        whole, part = divmod(index - self.start.first, self.start.indices_per_sample)
        length = self.start.sequence_length
        for digest, count in zip(self.start.weights, self.blend.counts(whole), strict=True):
            yield digest, int(count) * length
        if part:
            yield list(self.start.weights)[self.blend.locate(whole)[0]], part * length // self.start.indices_per_sample


class TrainingSet(Dataset[dict[str, torch.Tensor]]):
    """The training samples of a run.

    An index stands for `data.sequence_length` tokens. In a stage whose samples are m times as long, m consecutive
    indices stand for the same sample.

    Args:
        stages: the stages in order.
        names: name of each dataset by content digest.
        sizes: number of tokens of each dataset by content digest.
        length: number of indices.
    """

    def __init__(
        self, stages: Sequence[_StageSamples], names: Mapping[str, str], sizes: Mapping[str, int], length: int
    ) -> None:
        self._stages = stages
        self._firsts = [stage.start.first for stage in stages]
        self._names = names
        self._sizes = sizes
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `tokens` [S] and `labels` [S], both int64; `labels[t]` is the token after `tokens[t]`.

        Raises:
            IndexError: the index is outside the training set.
        """
        samples, number = self._locate(index)
        tokens = torch.from_numpy(samples.tokens(number))
        return {"tokens": tokens[:-1], "labels": tokens[1:]}

    def indices_per_sample(self, index: int) -> int:
        """Return how many consecutive indices stand for the sample at `index`."""
        return self._stage(index).start.indices_per_sample

    def stage_start(self, index: int) -> StageStart:
        """Return the beginning of the stage to which `index` belongs."""
        return self._stage(index).start

    def check_skipped(self, ranges: Iterable[Sequence[int]]) -> None:
        """Check that skipped ranges contain only whole samples.

        Raises:
            UserError: a range begins or ends within a sample.
        """
        for first, last in ranges:
            start = self.stage_start(first)
            offset, rest = (index % start.indices_per_sample for index in (first - start.first, last + 1 - start.first))
            if first >= start.first and (offset or rest):
                problem = f"begins or ends within a sample, for which {start.indices_per_sample} indices stand"
                remedy = f"skip from {first - offset} to {last + -rest % start.indices_per_sample}"
                raise UserError(f"train.skip_samples=[[{first}, {last}]]", problem, remedy)

    def describe_sample(self, index: int) -> str:
        """Describe the documents and the token files that a sample comes from."""
        samples, number = self._locate(index)
        return f"document {', '.join(map(str, samples.documents(number)))} of {samples.files.prefix}"

    def tokens_before(self, index: int) -> dict[str, int]:
        """Return the number of tokens of each dataset before `index`, by dataset name.

        Tokens that the run read under earlier settings of `data.train` are always included.
        """
        total = Counter(dict.fromkeys(self._names.values(), 0))
        for key, samples in self._stages[0].start.consumed.items():
            digest, _, length = key.rpartition("/")
            total[self._names.get(digest, "removed datasets")] += samples * int(length)
        for stage, end in zip(self._stages, [*self._firsts[1:], self._length], strict=True):
            for digest, tokens in stage.tokens_before(min(max(index, stage.start.first), end)):
                total[self._names[digest]] += tokens
        return dict(total)

    def shares(self) -> list[DatasetShare]:
        """Return the share of each dataset in the whole run."""
        tokens = self.tokens_before(self._length)
        total = sum(tokens.values())
        return [
            DatasetShare(name, self._sizes[digest], tokens[name] / total, tokens[name] / self._sizes[digest])
            for digest, name in self._names.items()
        ]

    def _stage(self, index: int) -> _StageSamples:
        return self._stages[max(bisect_right(self._firsts, index) - 1, 0)]

    def _locate(self, index: int) -> tuple[DatasetSamples, int]:
        if not self._firsts[0] <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self._stage(index).locate(index)


def build_training_set(
    config: DataConfig, seed: int, plan: Sequence[tuple[int, Stage]], length: int, resumed: StageStart | None = None
) -> TrainingSet:
    """Build the training samples from the current stage on.

    Args:
        config: the data settings, checked by `check_datasets`.
        seed: seed of the order.
        plan: the current stage and the later ones, each with the index of its first sample. The current stage begins
            at the next sample that the run will read.
        length: number of samples of the run.
        resumed: the beginning of the current stage as stored in the checkpoint; None for a new run and for checkpoints
            of version 0.1.0.

    Raises:
        UserError: a token file is missing or damaged, or the settings of the current stage have changed and
            `data.on_change` is "refuse".
    """
    every = {dataset.prefix: dataset for stage in config.all_stages() for dataset in stage.train}
    files = {prefix: inspect(prefix) for prefix in every}
    stages: list[_StageSamples] = []
    for first, stage in plan:
        start = _start(first, stage, files, seed, config.sequence_length)
        if stages:
            start = replace(start, consumed=stages[-1].start.consumed_at(first))
        else:
            start = _continued(start, resumed, config)
        samples = [
            DatasetSamples(files[dataset.prefix], stage.sequence_length, seed, files[dataset.prefix].digest)
            for dataset in stage.train
        ]
        stages.append(_StageSamples(start, samples, Blend(list(start.weights.values()))))
    names = dict(zip((each.digest for each in files.values()), dataset_names(list(every.values())), strict=True))
    return TrainingSet(stages, names, {each.digest: each.tokens for each in files.values()}, length)


def _start(first: int, stage: Stage, files: Mapping[str, TokenFiles], seed: int, tokens_per_index: int) -> StageStart:
    """Return the beginning of a stage that follows no other stage.

    Raises:
        UserError: two datasets have the same content.
    """
    total = sum(dataset.weight for dataset in stage.train)
    weights: dict[str, float] = {}
    for dataset in stage.train:
        if files[dataset.prefix].digest in weights:
            remedy = "list it once, with the sum of the weights"
            raise UserError(dataset.prefix, "has the same content as another dataset of data.train", remedy)
        weights[files[dataset.prefix].digest] = dataset.weight / total
    length = stage.sequence_length
    return StageStart(first, seed, length, length // tokens_per_index, weights, consumed={})


def _continued(start: StageStart, resumed: StageStart | None, config: DataConfig) -> StageStart:
    """Return the stage that the run continues: the resumed stage, or a new one if the settings have changed."""
    if resumed is None and start.first == 0:
        return start
    changed = ["the version of this program"] if resumed is None else start.differences(resumed)
    if resumed is not None and not changed:
        return resumed
    if config.on_change == "refuse":
        raise UserError(
            "data.on_change=refuse",
            f"the order of the training samples would change, because these changed since the checkpoint: "
            f"{', '.join(changed)}",
            "restore them, or set data.on_change=continue to read each dataset from where the run left off",
        )
    return start if resumed is None else replace(start, consumed=resumed.consumed_at(start.first))
