"""Load micro-batches for one data-parallel rank, starting at any position of a run.

Shape legend: B samples per micro-batch, S tokens per sample.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import UserError
from hypermoe_ds.process import STOP_SIGNALS, signal_when_parent_ends

IGNORED_LABEL = -100  # default `ignore_index` of torch.nn.functional.cross_entropy


class SizedDataset(Protocol):
    """A dataset with a length, whose samples consist of `tokens` [S] and `labels` [S]."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one sample."""


class TrainingSamples(SizedDataset, Protocol):
    """A dataset in which several consecutive indices can stand for the same sample."""

    def indices_per_sample(self, index: int) -> int:
        """Return how many consecutive indices stand for the sample at `index`."""


class ResumableSampler(Sampler[list[int]]):
    """Compute the sample indices of each micro-batch of a rank from the number of consumed samples.

    The samples from index `consumed_samples` on, without skipped samples, are divided into blocks of
    `size * micro_batch_size` samples. In micro-batch m, rank r reads the r-th group of `micro_batch_size` samples in
    block m. The samples of all ranks together therefore depend only on `consumed_samples`, and a run can resume on any
    number of ranks with the same samples. An incomplete last block is dropped.

    `indices_per_sample` returns how many consecutive indices stand for the sample at an index. A micro-batch lists only
    the first of these indices.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        length: int,
        micro_batch_size: int,
        rank: int,
        size: int,
        consumed_samples: int = 0,
        skipped_samples: SkippedSamples | None = None,
        indices_per_sample: Callable[[int], int] = lambda _: 1,
    ) -> None:
        if micro_batch_size <= 0 or not 0 <= rank < size:
            raise ValueError(f"out of range: {micro_batch_size=}, {rank=}, {size=}")
        if not 0 <= consumed_samples <= length:
            raise ValueError(f"{consumed_samples=} of {length}")
        self._start = consumed_samples
        self._rank = rank
        self._skipped_samples = skipped_samples or SkippedSamples()
        self._indices_per_sample = indices_per_sample
        self._micro_batch_size = micro_batch_size
        self._size = size
        self._micro_batches = self._skipped_samples.kept(consumed_samples, length) // (micro_batch_size * size)

    def __len__(self) -> int:
        return self._micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self._micro_batches):
            yield self.micro_batch(number, self._rank)

    def micro_batch(self, number: int, rank: int) -> list[int]:
        """Return the sample indices of one micro-batch of a rank; `number` counts micro-batches from 0."""
        first = (number * self._size + rank) * self._micro_batch_size
        indices = [self._skipped_samples.nth(self._start, first + offset) for offset in range(self._micro_batch_size)]
        return indices[:: self._indices_per_sample(indices[0])]


def build_loader(
    dataset: TrainingSamples,
    micro_batch_size: int,
    rank: int,
    size: int,
    consumed_samples: int,
    workers: int,
    vocab_size: int,
    document_end: int | None = None,
    skipped_samples: SkippedSamples | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the training micro-batches of one rank, from `consumed_samples` to the end of the dataset.

    Args:
        dataset: the training samples.
        micro_batch_size: B, the number of samples per micro-batch.
        rank: the data-parallel rank.
        size: number of data-parallel ranks.
        consumed_samples: number of samples that all ranks together have consumed.
        workers: number of loader processes; 0 loads in the current process.
        vocab_size: number of token embeddings of the model.
        document_end: id of the token that ends each document (see `mask_documents`); None disables masking.
        skipped_samples: samples that no rank reads.

    Yields:
        `input_ids` and `labels`, and `position_ids` if documents are masked, each [B, S] and int64; in pinned memory if
        there is a GPU.

    Raises:
        UserError: the dataset is exhausted, or a token id is negative or not below `vocab_size`.
        ValueError: an argument is out of range.
    """
    sampler = ResumableSampler(
        len(dataset), micro_batch_size, rank, size, consumed_samples, skipped_samples, dataset.indices_per_sample
    )
    return _until_exhausted(_load(dataset, sampler, workers, vocab_size, document_end), len(dataset))


def _until_exhausted(batches: Iterator[dict[str, torch.Tensor]], length: int) -> Iterator[dict[str, torch.Tensor]]:
    yield from batches
    problem = f"has {length} samples, and too few are left for another micro-batch"
    raise UserError("data.train", problem, "end the run here or raise train.steps")


def validation_batches(
    dataset: SizedDataset,
    micro_batch_size: int,
    rank: int,
    size: int,
    vocab_size: int,
    document_end: int | None = None,
    workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the validation micro-batches of one rank; all ranks together read every sample once.

    Every rank yields the same number of micro-batches of the same shape, because with expert parallelism each forward
    pass is collective. Incomplete micro-batches are padded with copies of the last sample, with all labels set to -100.

    Yields:
        `input_ids` and `labels`, and `position_ids` if documents are masked, each [B, S] and int64.

    Raises:
        ValueError: the dataset is empty or an argument is out of range.
    """
    length = len(dataset)
    if length == 0:
        raise ValueError("the validation dataset is empty")
    block = micro_batch_size * size
    padded = -(-length // block) * block
    sampler = ResumableSampler(padded, micro_batch_size, rank, size)
    return _load(_Padded(dataset, padded), sampler, workers, vocab_size, document_end)


class _Padded(Dataset[dict[str, torch.Tensor]]):
    """A dataset padded with copies of its last sample, with all labels set to -100."""

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


def _load(
    dataset: SizedDataset, sampler: ResumableSampler, workers: int, vocab_size: int, document_end: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    pinned = uses_gpu()
    loader: DataLoader[Any] = DataLoader(
        cast(Dataset[dict[str, torch.Tensor]], dataset),
        batch_sampler=sampler,
        num_workers=workers,
        # Forking two workers takes 0.03 s. Other start methods import all libraries in each worker (8 s or more).
        multiprocessing_context="fork" if workers else None,
        collate_fn=partial(_collate, document_end),
        worker_init_fn=_exit_with_rank,
        pin_memory=pinned,
        persistent_workers=workers > 0,
        # Draw the loader's seed from a separate generator, so that the global random state does not change.
        generator=torch.Generator(),
    )
    with _stop_signals_blocked():
        batches = iter(loader) if pinned else map(_Batch.tensors, loader)
    return _with_valid_ids(batches, sampler, vocab_size)


def _with_valid_ids(
    batches: Iterator[dict[str, torch.Tensor]], sampler: ResumableSampler, vocab_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Check the token ids of each micro-batch.

    On a GPU, an invalid id would end all ranks without an error message that names the sample.
    """
    for batch, indices in zip(batches, sampler, strict=True):
        for name, lowest in (("input_ids", 0), ("labels", IGNORED_LABEL)):
            invalid = (batch[name] < lowest) | (batch[name] >= vocab_size)
            if invalid.any():
                row, token = invalid.nonzero()[0].tolist()
                problem = f"has token id {int(batch[name][row, token])}, and the model {vocab_size} embeddings"
                remedy = "preprocess the text with the tokenizer of data.tokenizer, or raise model.vocab_size"
                raise UserError(f"sample {indices[row]}", problem, remedy)
        yield batch


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals while workers are forked.

    Workers inherit the blocked signals, so no stop signal can end them at startup.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_rank(_worker: int) -> None:
    """Make a worker ignore the launcher's stop signals, and exit when its rank stops the worker or dies.

    The launcher also signals the workers of a rank, but the rank needs its workers to finish the step. A worker that
    outlives its rank keeps the rank's connections open, so other ranks would detect the failure only after 5 s.
    """
    rank = os.getppid()

    def listen() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != rank:
            pass
        os._exit(0)

    Thread(target=listen, daemon=True).start()
    signal_when_parent_ends(signal.SIGKILL)


@dataclass(frozen=True)
class _Batch:
    """A micro-batch that is sent from a worker to its rank.

    Micro-batches are sent as NumPy arrays, because torch sends tensors through a socket in a folder named `pymp-*` in
    TMPDIR, and this folder remains if the worker is killed.
    """

    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    position_ids: np.ndarray[Any, Any] | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the model inputs as tensors."""
        return {name: torch.from_numpy(array) for name, array in vars(self).items() if array is not None}

    def pin_memory(self) -> dict[str, torch.Tensor]:
        """Return the model inputs in pinned memory.

        The data loader calls this method, in a thread if there are workers.
        """
        return {name: tensor.pin_memory() for name, tensor in self.tensors().items()}


def _collate(document_end: int | None, samples: Sequence[dict[str, torch.Tensor]]) -> _Batch:
    tokens, labels = (torch.stack([sample[name] for sample in samples]).numpy() for name in ("tokens", "labels"))
    if document_end is None:
        return _Batch(tokens, labels, None)
    return _Batch(tokens, *mask_documents(tokens, labels, document_end))


def mask_documents(
    tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], document_end: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Separate the documents in a batch of samples.

    The positions restart at 0 after each `document_end`. From the positions, the model computes which tokens belong to
    the same document. The label of each `document_end`, that is, the first token of the next document, becomes -100.

    Args:
        tokens: token ids, [B, S].
        labels: the token after each token, [B, S].
        document_end: id of the token that ends each document.

    Returns:
        The labels and the positions, both [B, S].
    """
    ends = tokens == document_end
    indices = np.arange(tokens.shape[1])
    starts = np.zeros_like(tokens)
    starts[:, 1:] = np.where(ends[:, :-1], indices[1:], 0)
    positions = indices - np.maximum.accumulate(starts, axis=1)
    return np.where(ends, IGNORED_LABEL, labels), positions
