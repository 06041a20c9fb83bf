"""Test the samples that each rank reads against a plain enumeration."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

import psutil
import pytest
import torch

from hypermoe_ds.data.loader import IGNORED_LABEL, ResumableSampler, build_loader, validation_batches
from hypermoe_ds.errors import UserError

S = 5

NUMBERS = 2 * 10**9  # above all token ids of `Numbered`


class Numbered:
    """Dataset whose sample i consists of S tokens with the value i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.full((S,), index), "labels": torch.full((S,), index + 1)}

    def indices_per_sample(self, index: int) -> int:
        return 1


@pytest.mark.parametrize(
    ("length", "batch", "size", "consumed"), list(product((0, 1, 17, 64), (1, 3), (1, 2, 4), (0, 1)))
)
def test_ranks_together_read_the_samples_in_order(length: int, batch: int, size: int, consumed: int) -> None:
    if consumed > length:
        return
    samplers = [ResumableSampler(length, batch, rank, size, consumed) for rank in range(size)]
    read = [index for step in zip(*samplers, strict=True) for block in step for index in block]
    steps = (length - consumed) // (batch * size)
    assert read == list(range(consumed, consumed + steps * batch * size))
    assert {len(sampler) for sampler in samplers} == {steps}
    assert length - consumed - len(read) < batch * size


def test_resume_on_another_number_of_ranks_continues_with_the_same_samples() -> None:
    def global_steps(size: int, consumed: int) -> list[int]:
        ranks = [ResumableSampler(96, 12 // size, rank, size, consumed) for rank in range(size)]
        return [index for step in zip(*ranks, strict=True) for block in step for index in block]

    uninterrupted = global_steps(4, 0)
    for size in (1, 2, 3, 6, 12):
        assert global_steps(4, 0)[:24] + global_steps(size, 24) == uninterrupted


@pytest.mark.parametrize("arguments", [(10, 0, 0, 1, 0), (10, 1, 1, 1, 0), (10, 1, -1, 1, 0), (10, 1, 0, 1, 11)])
def test_sampler_arguments_out_of_range_are_refused(arguments: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"out of range|consumed_samples"):
        ResumableSampler(*arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_yields_the_samples_of_the_sampler(workers: int) -> None:
    state = torch.get_rng_state()
    batches = build_loader(Numbered(23), 2, rank=1, size=2, consumed_samples=3, workers=workers, vocab_size=NUMBERS)
    for block in ResumableSampler(23, 2, 1, 2, 3):
        batch = next(batches)
        assert batch.keys() == {"input_ids", "labels"}
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["input_ids"].tolist() == [[index] * S for index in block]
        assert batch["labels"].tolist() == [[index + 1] * S for index in block]
    assert torch.equal(torch.get_rng_state(), state), "loading does not change the global random state"
    with pytest.raises(UserError, match="has 23 samples, and too few are left for another micro-batch"):
        next(batches)


def test_workers_ignore_sigterm_and_exit_with_their_rank() -> None:
    def rank() -> None:
        batches = build_loader(Numbered(2000), 1, rank=0, size=1, consumed_samples=0, workers=2, vocab_size=NUMBERS)
        next(batches)
        workers = psutil.Process().children()
        assert len(workers) == 2
        sender = multiprocessing.get_context("fork").Process(target=lambda: [w.terminate() for w in workers])
        sender.start()
        sender.join()
        assert [int(batch["input_ids"][0, 0]) for batch in batches_until(batches, 2000)] == list(range(1, 2000))
        sys.exit(3)  # the loader is still in use, as when a rank exits with an error

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    process.join(60)
    exited, exit_code = not process.is_alive(), process.exitcode
    process.kill()
    assert (exited, exit_code) == (True, 3)


def test_killed_workers_leave_no_temporary_folders(tmp_path: Path) -> None:
    def rank() -> None:
        tempfile.tempdir = str(tmp_path)
        multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
        batches = build_loader(Numbered(20), 1, rank=0, size=1, consumed_samples=0, workers=2, vocab_size=NUMBERS)
        assert [int(next(batches)["labels"][0, 0]) for _ in range(4)] == [1, 2, 3, 4]
        os.kill(os.getpid(), signal.SIGKILL)  # the workers receive the signal too

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    process.join(60)
    assert (process.exitcode, list(tmp_path.iterdir())) == (-signal.SIGKILL, [])


def batches_until(batches: Iterator[dict[str, torch.Tensor]], end: int) -> list[dict[str, torch.Tensor]]:
    return [next(batches) for _ in range(1, end)]


def test_a_loader_refuses_more_consumed_samples_than_the_dataset_has() -> None:
    with pytest.raises(ValueError, match="consumed_samples=24 of 23"):
        build_loader(Numbered(23), 2, rank=0, size=1, consumed_samples=24, workers=0, vocab_size=NUMBERS)


@pytest.mark.parametrize(("length", "batch", "size"), list(product((1, 2, 7, 24), (1, 4), (1, 2, 3, 8))))
def test_validation_reads_every_sample_once_with_equal_steps_per_rank(length: int, batch: int, size: int) -> None:
    ranks = [list(validation_batches(Numbered(length), batch, rank, size, NUMBERS)) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {-(-length // (batch * size))}
    read = []
    for micro_batch in (micro_batch for batches in ranks for micro_batch in batches):
        assert micro_batch["input_ids"].shape == micro_batch["labels"].shape == (batch, S)
        for tokens, labels in zip(micro_batch["input_ids"].tolist(), micro_batch["labels"].tolist(), strict=True):
            assert labels in ([tokens[0] + 1] * S, [IGNORED_LABEL] * S)
            if labels[0] != IGNORED_LABEL:
                read.append(tokens[0])
    assert sorted(read) == list(range(length))


def test_validation_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="is empty"):
        validation_batches(Numbered(0), 1, 0, 1, NUMBERS)


def test_a_loader_without_workers_does_not_read_ahead() -> None:
    batches = build_loader(Numbered(10**9), 2, rank=0, size=4, consumed_samples=10**8, workers=0, vocab_size=NUMBERS)
    assert [batch["input_ids"][0, 0].item() for batch in islice(batches, 3)] == [10**8, 10**8 + 8, 10**8 + 16]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("vocab_size", [20, 21])
def test_a_token_id_beyond_the_models_vocabulary_is_refused_and_the_sample_is_named(
    workers: int, vocab_size: int
) -> None:
    # All inputs of sample i are i, and all its labels are i + 1. Rank 1 reads the samples 4k + 2 and 4k + 3.
    batches = build_loader(Numbered(64), 2, rank=1, size=2, consumed_samples=0, workers=workers, vocab_size=vocab_size)
    read = []
    with pytest.raises(UserError) as refused:
        read += [batch["input_ids"][0, 0].item() for batch in iter(lambda: next(batches), None)]
    assert (
        refused.value.args
        == UserError(
            f"sample {19 if vocab_size == 20 else 22}",
            f"has token id {20 if vocab_size == 20 else 22}, and the model {vocab_size} embeddings",
            "preprocess the text with the tokenizer of data.tokenizer, or raise model.vocab_size",
        ).args
    )


def test_a_negative_token_id_is_refused_but_an_ignored_label_is_not() -> None:
    class Shifted(Numbered):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ignored = torch.full((S,), IGNORED_LABEL)
            return {"tokens": torch.full((S,), 2 - index), "labels": ignored}

    batches = validation_batches(Shifted(5), 1, rank=0, size=1, vocab_size=10)
    assert [next(batches)["input_ids"][0, 0].item() for _ in range(3)] == [2, 1, 0]
    with pytest.raises(UserError, match="sample 3: has token id -1"):
        next(batches)
