"""Properties of the sample order that hold for any documents, weights, ranks, restarts and number of epochs."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypermoe_ds.config import validate
from hypermoe_ds.data.loader import ResumableSampler, mask_documents
from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.data.training_set import TrainingSet
from tests.helpers.corpus import write_token_files
from tests.helpers.datasets import training_set

END = 0
RELAXED = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def build(folder: Path, lengths: list[list[int]], weights: list[float], sequence_length: int) -> DataConfig:
    """Write one dataset per list of document lengths; the token values of dataset n count up from 1 + 10,000 n."""
    train: list[dict[str, Any]] = []
    for number, (each, weight) in enumerate(zip(lengths, weights, strict=False)):
        values = itertools.count(1 + 10_000 * number)
        padded = [*each, sequence_length + 1]
        tokens = [[*itertools.islice(values, length - 1), END] for length in padded]
        prefix = f"{folder}/{len(list(folder.iterdir()))}"
        write_token_files(prefix, tokens, large=True)
        train.append({"prefix": prefix, "weight": weight})
    return validate(DataConfig, {"train": train, "sequence_length": sequence_length, "tokenizer": "t"}, "recipe")


@RELAXED
@given(
    lengths=st.lists(documents, min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    sequence_length=st.integers(1, 32),
)
def test_every_dataset_is_read_epoch_by_epoch_without_gaps(
    tmp_path: Path, lengths: list[list[int]], weights: list[float], sequence_length: int
) -> None:
    config = build(tmp_path, lengths, weights, sequence_length)
    found = training_set(config, 300)
    read: dict[str, list[tuple[int, ...]]] = {dataset.prefix: [] for dataset in config.train}
    for index in range(300):
        prefix = found.describe_sample(index).rpartition(" of ")[2]
        read[prefix].append(tuple(found[index]["tokens"].tolist()))
    for prefix, samples in read.items():
        stream = np.fromfile(f"{prefix}.bin", dtype=np.int32).tolist()
        epoch = (len(stream) - 1) // sequence_length
        for first in range(0, len(samples) - epoch + 1, epoch):
            assert Counter(samples[first : first + epoch]) in (
                cuts(stream[shift:], epoch, sequence_length) for shift in range(len(stream) - epoch * sequence_length)
            )


def cuts(stream: list[int], count: int, length: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(stream[start : start + length]) for start in range(0, count * length, length))


@RELAXED
@given(
    lengths=st.lists(documents, min_size=2, max_size=3),
    layouts=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2])), min_size=1, max_size=4),
    skipped=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 9)), max_size=3),
)
def test_restarts_on_any_ranks_read_the_samples_of_one_process(
    tmp_path: Path, lengths: list[list[int]], layouts: list[tuple[int, int]], skipped: list[tuple[int, int]]
) -> None:
    config = build(tmp_path, lengths, [1.0, 2.5, 0.3], 8)
    ranges = SkippedSamples([first, first + more] for first, more in skipped)
    whole = training_set(config, 400)
    serial = [index for begin, end in ranges.kept_ranges(0, 400) for index in range(begin, end)]
    read: list[list[int]] = []
    consumed = 0
    for ranks, micro_batch in layouts:  # each launch resumes from the checkpoint of the launch before
        resumed: TrainingSet = training_set(config, 400, resumed=whole.stage_start(consumed), consumed=consumed)
        samplers = [ResumableSampler(400, micro_batch, rank, ranks, consumed, ranges) for rank in range(ranks)]
        for step in itertools.islice(zip(*samplers, strict=True), 5):
            indices = [index for rank in step for index in rank]
            read += [resumed[index]["tokens"].tolist() for index in indices]
            consumed = indices[-1] + 1
    assert read == [whole[index]["tokens"].tolist() for index in serial[: len(read)]]


@RELAXED
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4))
def test_masked_documents_are_those_that_a_loop_over_the_tokens_finds(rows: list[list[int]]) -> None:
    samples = np.array(rows)
    labels, positions = mask_documents(samples[:, :-1], samples[:, 1:], END)
    for row, sample in enumerate(rows):
        position = 0
        for place, token in enumerate(sample[:-1]):
            assert positions[row, place] == position
            assert labels[row, place] == (-100 if token == END else sample[place + 1])
            position = 0 if token == END else position + 1


@pytest.mark.parametrize("end", [1, 7])
def test_masking_leaves_other_labels_and_the_tokens_unchanged(end: int) -> None:
    tokens = np.array([[5, end, 6, 8]])
    labels, positions = mask_documents(tokens, np.array([[end, 6, 8, 9]]), end)
    assert (tokens.tolist(), labels.tolist(), positions.tolist()) == (
        [[5, end, 6, 8]],
        [[end, -100, 8, 9]],
        [[0, 1, 0, 1]],
    )
