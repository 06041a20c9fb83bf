"""Batches of samples for one data-parallel rank, from any point of a run.

Shapes: B samples of a micro-batch, S tokens of a sample.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.errors import UserError
from hypermoe_ds.process import STOP_SIGNALS, signal_when_parent_ends

IGNORED_LABEL = -100  # what torch.nn.functional.cross_entropy leaves out


class SizedDataset(Protocol):
    """A dataset of samples `tokens` [S] and `labels` [S] that knows its length."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample."""


class ResumableSampler(Sampler[list[int]]):
    """Which samples a rank takes, micro-batch by micro-batch, as arithmetic on consumed samples.

    Micro-batch m of all ranks together is the m-th block of `size * micro_batch_size` samples from
    `consumed_samples` on, those left out not counted; rank r takes the r-th run of `micro_batch_size` in
    it. The samples that all ranks take therefore depend on `consumed_samples` alone, and a run
    continues with the same ones on another number of ranks. An incomplete last block is dropped.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        length: int,
        micro_batch_size: int,
        rank: int,
        size: int,
        consumed_samples: int = 0,
        skipped_samples: SkippedSamples | None = None,
    ) -> None:
        if micro_batch_size <= 0 or not 0 <= rank < size:
            raise ValueError(f"no such place: {micro_batch_size=}, {rank=}, {size=}")
        if not 0 <= consumed_samples <= length:
            raise ValueError(f"{consumed_samples=} of {length}")
        self._start = consumed_samples
        self._rank = rank
        self._left_out = skipped_samples or SkippedSamples()
        self._micro_batch_size = micro_batch_size
        self._size = size
        self._micro_batches = self._left_out.kept(consumed_samples, length) // (micro_batch_size * size)

    def __len__(self) -> int:
        return self._micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self._micro_batches):
            yield self.micro_batch(number, self._rank)

    def micro_batch(self, number: int, rank: int) -> list[int]:
        """The samples that a rank takes as its micro-batch of that number, counted from 0."""
        first = (number * self._size + rank) * self._micro_batch_size
        return [self._left_out.nth(self._start, first + place) for place in range(self._micro_batch_size)]


def build_loader(
    dataset: SizedDataset,
    micro_batch_size: int,
    rank: int,
    size: int,
    consumed_samples: int,
    workers: int,
    skipped_samples: SkippedSamples | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Training micro-batches of one rank, from `consumed_samples` to the end of the dataset.

    Args:
        dataset: the training samples.
        micro_batch_size: B, samples per rank.
        rank: the data-parallel rank.
        size: number of data-parallel ranks.
        consumed_samples: samples that all ranks together have taken before.
        workers: processes that load; 0 loads in this one.
        left_out: samples that nobody takes.

    Yields:
        `input_ids` [B, S] and `labels` [B, S], int64; in pinned memory where there is a GPU.

    Raises:
        UserError: samples are asked for beyond the end of the dataset.
        ValueError: a number is out of range.
    """
    sampler = ResumableSampler(len(dataset), micro_batch_size, rank, size, consumed_samples, skipped_samples)
    return _until_exhausted(_load(dataset, sampler, workers), len(dataset))


def _until_exhausted(batches: Iterator[dict[str, torch.Tensor]], length: int) -> Iterator[dict[str, torch.Tensor]]:
    yield from batches
    problem = f"has no whole micro-batch left of its {length} samples"
    raise UserError("data.train", problem, "end the run here or raise train.steps")


def validation_batches(
    dataset: SizedDataset, micro_batch_size: int, rank: int, size: int, workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of one rank that together with those of the other ranks hold every sample once.

    Every rank yields the same number of micro-batches of the same shape, because experts that lie on
    several ranks make each forward pass a collective one. Samples that are missing at the end
    are replaced by the last one with all labels -100.

    Yields:
        `input_ids` [B, S] and `labels` [B, S], int64.

    Raises:
        ValueError: the dataset is empty or a number is out of range.
    """
    length = len(dataset)
    if length == 0:
        raise ValueError("there is no sample to validate on")
    block = micro_batch_size * size
    padded = -(-length // block) * block
    return _load(_Padded(dataset, padded), ResumableSampler(padded, micro_batch_size, rank, size), workers)


class _Padded(Dataset[dict[str, torch.Tensor]]):
    """A dataset continued by its last sample without labels."""

    def __init__(self, dataset: SizedDataset, length: int) -> None:
        self._dataset = dataset
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self._dataset[min(index, len(self._dataset) - 1)]
        if index < len(self._dataset):
            return sample
        return {"tokens": sample["tokens"], "labels": torch.full_like(sample["labels"], IGNORED_LABEL)}


def _load(dataset: SizedDataset, sampler: ResumableSampler, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    pinned = torch.cuda.is_available()
    loader: DataLoader[Any] = DataLoader(
        cast(Dataset[dict[str, torch.Tensor]], dataset),
        batch_sampler=sampler,
        num_workers=workers,
        # 0.03 s for two: another start method imports all libraries in each worker, 8 s and more.
        multiprocessing_context="fork" if workers else None,
        collate_fn=_collate,
        worker_init_fn=_end_with_the_rank,
        pin_memory=pinned,
        persistent_workers=workers > 0,
        # Its own: a loader draws a seed, and would move the random numbers of the model.
        generator=torch.Generator(),
    )
    return iter(loader) if pinned else map(_Batch.tensors, loader)


def _end_with_the_rank(_worker: int) -> None:
    """The launcher signals a rank's children too: they load on until the rank, which finishes its step, ends them.

    When the rank dies they go with it: they hold copies of its connections, and as long as one is open no other rank
    sees that it died (5 s, without this).
    """
    rank = os.getppid()

    def listen() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != rank:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    Thread(target=listen, daemon=True).start()
    signal_when_parent_ends(signal.SIGKILL)


@dataclass(frozen=True)
class _Batch:
    """A micro-batch on its way from a worker to its rank.

    As arrays: for tensors torch opens a socket in a folder `pymp-*` of TMPDIR, which stays when the worker is killed.
    """

    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the model takes."""
        return {name: torch.from_numpy(array) for name, array in vars(self).items()}

    def pin_memory(self) -> dict[str, torch.Tensor]:
        """The same in pinned memory; the loader calls it, in a thread of its own where it has workers."""
        return {name: tensor.pin_memory() for name, tensor in self.tensors().items()}


def _collate(samples: Sequence[dict[str, torch.Tensor]]) -> _Batch:
    stacked = (torch.stack([sample[name] for sample in samples]).numpy() for name in ("tokens", "labels"))
    return _Batch(*stacked)
