"""Test that training samples are slices of the token streams, in an order that the settings determine."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypermoe_ds.data.loader import build_loader
from hypermoe_ds.data.stage_start import StageStart
from hypermoe_ds.errors import UserError
from tests.helpers.corpus import TokenisedCorpus, write_token_files
from tests.helpers.datasets import data_config, rows, training_set

S = 64


def numbered(folder: Path, sizes: dict[str, int], **changes: Any) -> list[dict[str, Any]]:
    """Write datasets whose tokens count up from 1,000,000 n in dataset n, and return their settings."""
    for number, (name, size) in enumerate(sizes.items()):
        first = 1_000_000 * number
        write_token_files(f"{folder}/{name}", [list(range(first, first + size))], large=True)
    return [{"prefix": f"{folder}/{name}", **changes} for name in sizes]


def starts(dataset: Any, first: int, end: int) -> list[int]:
    """Return the first token of each sample. In numbered datasets, it identifies the dataset and the position."""
    return [int(dataset[index]["tokens"][0]) for index in range(first, end)]


def test_samples_are_slices_of_the_token_stream(corpus: TokenisedCorpus) -> None:
    dataset = training_set(data_config(corpus), 50)
    stream = np.fromfile(f"{corpus.train}.bin", dtype=np.uint16).tolist()
    slices = {tuple(stream[start : start + S + 1]) for start in range(len(stream) - S)}
    assert set(rows(dataset)) <= slices
    sample = dataset[0]
    assert sample.keys() == {"tokens", "labels"}
    assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])


@pytest.mark.parametrize("size", [S + 1, 2 * S, 2 * S + 1, 1476, 5000])
def test_each_epoch_contains_every_token_once_except_those_that_do_not_fill_a_sample(
    corpus: TokenisedCorpus, tmp_path: Path, size: int
) -> None:
    config = data_config(corpus, train=numbered(tmp_path, {"a": size}))
    epoch = (size - 1) // S
    dataset = training_set(config, 3 * epoch)
    orders = [starts(dataset, number * epoch, (number + 1) * epoch) for number in range(3)]
    for order in orders:
        assert sorted(order) == list(range(min(order), min(order) + epoch * S, S))
        assert 0 <= min(order) <= size - 1 - epoch * S
    if epoch > 10:
        shuffled = [np.argsort(order).tolist() for order in orders]
        assert shuffled[0] != shuffled[1] != shuffled[2] != shuffled[0], "each epoch has its own order"


def test_tokens_that_do_not_fill_a_sample_are_read_in_other_epochs(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    size = 10 * S + 33
    dataset = training_set(data_config(corpus, train=numbered(tmp_path, {"a": size})), 10 * 200)
    seen = {token for row in rows(dataset) for token in row}
    assert seen == set(range(size))


@pytest.mark.parametrize("lengths", [(10, 11), (10, 400), (300, 1000)])
def test_a_longer_run_continues_the_order_of_a_shorter_run(
    corpus: TokenisedCorpus, tmp_path: Path, lengths: tuple[int, int]
) -> None:
    config = data_config(corpus, train=numbered(tmp_path, {"a": 3000, "b": 7000}))
    short, long = (training_set(config, length) for length in lengths)
    assert starts(long, 0, lengths[0]) == starts(short, 0, lengths[0])


def test_the_seed_determines_the_order(corpus: TokenisedCorpus) -> None:
    config = data_config(corpus)
    first, again, other = (rows(training_set(config, 300, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_order_does_not_depend_on_the_folder_of_the_token_files(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    found = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        train = numbered(tmp_path / name, {"a": 3000, "b": 7000})
        found.append(starts(training_set(data_config(corpus, train=train), 100), 0, 100))
    assert found[0] == found[1]


def test_datasets_are_interleaved_in_proportion_to_their_weights(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    weights = {"a": 6, "b": 1.5, "c": 2.5}
    train = numbered(tmp_path, dict.fromkeys(weights, 5000))
    train = [{**dataset, "weight": weight} for dataset, weight in zip(train, weights.values(), strict=True)]
    drawn = np.array(starts(training_set(data_config(corpus, train=train), 1000), 0, 1000)) // 1_000_000
    for start in range(0, 1000, 100):
        assert np.abs(np.bincount(drawn[start : start + 100], minlength=3) - [60, 15, 25]).max() <= 2
    assert np.abs(np.bincount(drawn) - [600, 150, 250]).max() <= 1


def test_a_dataset_in_a_blend_keeps_its_own_order(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    train = numbered(tmp_path, {"a": 3000, "b": 7000})
    alone = [starts(training_set(data_config(corpus, train=[dataset]), 200), 0, 200) for dataset in train]
    blended = starts(training_set(data_config(corpus, train=train), 300), 0, 300)
    for number, order in enumerate(alone):
        own = [token for token in blended if token // 1_000_000 == number]
        assert own == order[: len(own)]


def test_describe_sample_names_the_documents_of_its_tokens(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    names = [f"{tmp_path}/{number}" for number in range(2)]
    for number_of_dataset, name in enumerate(names):  # each document repeats its own token id
        write_token_files(name, [[100 * number_of_dataset + number] * (20 + 9 * number) for number in range(30)])
    dataset = training_set(data_config(corpus, train=[{"prefix": name} for name in names]), 40)
    for index in range(40):
        tokens = [*dataset[index]["tokens"].tolist(), int(dataset[index]["labels"][-1])]
        numbers = sorted({token % 100 for token in tokens})
        expected = f"document {', '.join(map(str, numbers))} of {names[tokens[0] // 100]}"
        assert dataset.describe_sample(index) == expected


def test_a_dataset_listed_twice_is_refused(corpus: TokenisedCorpus) -> None:
    config = data_config(corpus, train=[{"prefix": corpus.train}, {"prefix": f"{corpus.train}"}])
    with pytest.raises(UserError, match="has the same content as another dataset"):
        training_set(config, 10)


def test_indices_outside_the_run_are_refused(corpus: TokenisedCorpus) -> None:
    dataset = training_set(data_config(corpus), 5)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"sample {index} of 5"):
            dataset[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_after_the_consumed_samples(corpus: TokenisedCorpus, workers: int) -> None:
    dataset = training_set(data_config(corpus), 40)
    expected = rows(dataset)
    batches = build_loader(dataset, 3, rank=1, size=2, consumed_samples=12, workers=workers, vocab_size=10**6)
    for start in (15, 21, 27):
        batch = next(batches)
        found = torch.cat((batch["input_ids"], batch["labels"][:, -1:]), dim=1).tolist()
        assert list(map(tuple, found)) == expected[start : start + 3]


def test_an_unchanged_run_resumes_the_same_order(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    train = numbered(tmp_path, {"a": 3000, "b": 7000}, weight=0.3)
    stages = [{"from_step": 41, "train": train[:1]}, {"from_step": 81, "sequence_length": 2 * S}]
    config = data_config(corpus, train=train, stages=stages)
    whole = training_set(config, 600, batch=4)
    for consumed in (4, 100, 160, 200, 320, 324):
        resumed = training_set(config, 600, resumed=whole.stage_start(consumed), consumed=consumed, batch=4)
        assert starts(resumed, consumed, 600) == starts(whole, consumed, 600)
        assert resumed.tokens_before(600) == whole.tokens_before(600)


class TestChangedData:
    """A run of 100 samples of the datasets a and b, resumed with other settings."""

    @pytest.fixture
    def sets(self, tmp_path: Path) -> list[dict[str, Any]]:
        return numbered(tmp_path, {"a": 3000, "b": 7000, "c": 5000})

    def before(self, corpus: TokenisedCorpus, sets: list[dict[str, Any]]) -> tuple[StageStart, list[int]]:
        dataset = training_set(data_config(corpus, train=sets[:2]), 100)
        return dataset.stage_start(100), starts(dataset, 0, 100)

    @pytest.mark.parametrize(
        ("changes", "seed", "message"),
        [
            ({"train": [0, 1, 2]}, 1, "the datasets of data.train or their content"),
            ({"train": [1, 0]}, 1, "the datasets of data.train or their content"),
            ({"sequence_length": 32}, 1, "data.sequence_length"),
            ({}, 2, "train.seed"),
        ],
    )
    def test_a_changed_order_is_refused_by_name(
        self, corpus: TokenisedCorpus, sets: list[dict[str, Any]], changes: dict[str, Any], seed: int, message: str
    ) -> None:
        start, _ = self.before(corpus, sets)
        numbers = changes.pop("train", [0, 1])
        config = data_config(corpus, train=[sets[number] for number in numbers], **changes)
        with pytest.raises(UserError, match=rf"^data\.on_change=refuse: .*checkpoint: {message};"):
            training_set(config, 200, seed, resumed=start, consumed=100)

    def test_changed_weights_are_refused_by_name(self, corpus: TokenisedCorpus, sets: list[dict[str, Any]]) -> None:
        start, _ = self.before(corpus, sets)
        config = data_config(corpus, train=[{**sets[0], "weight": 3}, sets[1]])
        with pytest.raises(UserError, match=r"checkpoint: the weights of data\.train;"):
            training_set(config, 200, resumed=start, consumed=100)

    def test_the_same_weights_on_another_scale_are_no_change(
        self, corpus: TokenisedCorpus, sets: list[dict[str, Any]]
    ) -> None:
        start, _ = self.before(corpus, sets)
        config = data_config(corpus, train=[{**dataset, "weight": 2.0} for dataset in sets[:2]])
        assert training_set(config, 200, resumed=start, consumed=100).stage_start(150) == start

    def test_each_dataset_continues_where_the_run_left_off(
        self, corpus: TokenisedCorpus, sets: list[dict[str, Any]]
    ) -> None:
        start, read = self.before(corpus, sets)
        config = data_config(corpus, train=[{**sets[1], "weight": 3.0}, sets[2]], on_change="continue")
        changed = training_set(config, 200, resumed=start, consumed=100)
        added = starts(changed, 100, 200)
        alone = {
            number: starts(training_set(data_config(corpus, train=[sets[number]]), 200), 0, 200) for number in (1, 2)
        }
        of_b, of_c = ([token for token in added if token // 1_000_000 == number] for number in (1, 2))
        earlier = [token for token in read if token // 1_000_000 == 1]
        assert earlier + of_b == alone[1][: len(earlier) + len(of_b)]
        assert of_c == alone[2][: len(of_c)]
        assert (len(of_b), len(of_c)) == (75, 25)
        counts = Counter(token // 1_000_000 for token in read + added)
        assert changed.tokens_before(200) == {"b": counts[1] * S, "c": counts[2] * S, "removed datasets": counts[0] * S}

    def test_a_second_resume_needs_no_permission(self, corpus: TokenisedCorpus, sets: list[dict[str, Any]]) -> None:
        start, _ = self.before(corpus, sets)
        changed = training_set(data_config(corpus, train=sets, on_change="continue"), 200, resumed=start, consumed=100)
        again = training_set(data_config(corpus, train=sets), 200, resumed=changed.stage_start(130), consumed=130)
        assert starts(again, 130, 200) == starts(changed, 130, 200)


class TestStages:
    """Each stage has its own sample order, which begins at the first step of the stage."""

    def test_datasets_and_weights_change_at_the_step(self, corpus: TokenisedCorpus, tmp_path: Path) -> None:
        sets = numbered(tmp_path, {"a": 3000, "b": 7000, "c": 5000})
        later = [{**sets[1], "weight": 1.0}, {**sets[2], "weight": 3.0}]
        config = data_config(corpus, train=sets[:2], stages=[{"from_step": 11, "train": later}])
        found = starts(training_set(config, 80, batch=4), 0, 80)
        plain = starts(training_set(data_config(corpus, train=sets[:2]), 40), 0, 40)
        assert found[:40] == plain
        assert Counter(token // 1_000_000 for token in found[40:]) == {1: 10, 2: 30}
        alone = starts(training_set(data_config(corpus, train=[sets[1]]), 80), 0, 80)
        of_b = [token for token in found if token // 1_000_000 == 1]
        assert of_b == alone[: len(of_b)], "b continues where the first stage left off"

    def test_longer_samples_fill_the_same_micro_batches(self, corpus: TokenisedCorpus, tmp_path: Path) -> None:
        config = data_config(
            corpus, train=numbered(tmp_path, {"a": 20_000}), stages=[{"from_step": 4, "sequence_length": 4 * S}]
        )
        dataset = training_set(config, 80, batch=8)
        loaders = [build_loader(dataset, 4, rank, 2, 0, workers=0, vocab_size=10**6) for rank in range(2)]
        seen: list[list[int]] = []
        for step in range(10):
            for loader in loaders:
                batch = next(loader)
                assert batch["input_ids"].shape == ((4, S) if step < 3 else (1, 4 * S))
                assert torch.equal(batch["labels"], batch["input_ids"] + 1)
                seen += batch["input_ids"].tolist() if step >= 3 else []
        tokens = [token for row in seen for token in row]
        assert len(set(tokens)) == len(tokens) == 7 * 8 * S
        assert dataset.tokens_before(80) == {"a": 80 * S}
        alone = training_set(data_config(corpus, train=config.model_dump()["train"], sequence_length=4 * S), 14)
        assert [row[0] for row in seen] == starts(alone, 0, 14)

    def test_a_resume_within_a_stage_of_longer_samples_reads_the_same(
        self, corpus: TokenisedCorpus, tmp_path: Path
    ) -> None:
        config = data_config(
            corpus, train=numbered(tmp_path, {"a": 20_000}), stages=[{"from_step": 3, "sequence_length": 2 * S}]
        )
        whole = training_set(config, 80, batch=8)
        resumed = training_set(config, 80, resumed=whole.stage_start(40), consumed=40, batch=8)
        batches = [
            torch.cat([batch["input_ids"] for batch in islice(build_loader(each, 4, 0, 1, 40, 0, 10**6), 5)])
            for each in (whole, resumed)
        ]
        assert torch.equal(*batches)

    @pytest.mark.parametrize(
        ("skipped", "valid"), [([0, 15], True), ([3, 5], True), ([16, 19], True), ([18, 19], False), ([16, 16], False)]
    )
    def test_a_skipped_range_that_cuts_a_sample_is_refused(
        self, corpus: TokenisedCorpus, tmp_path: Path, skipped: list[int], valid: bool
    ) -> None:
        config = data_config(
            corpus, train=numbered(tmp_path, {"a": 20_000}), stages=[{"from_step": 3, "sequence_length": 4 * S}]
        )
        dataset = training_set(config, 80, batch=8)
        if valid:
            dataset.check_skipped([skipped])
        else:
            with pytest.raises(UserError, match=r"train\.skip_samples=.*; skip from 16 to 19$"):
                dataset.check_skipped([skipped])

    @pytest.mark.parametrize(
        ("stages", "message"),
        [
            ([{"from_step": 5}, {"from_step": 5}], r"stages\.1\.from_step=5: the stage before begins at step 5"),
            ([{"from_step": 5, "sequence_length": 100}], r"stages\.0\.sequence_length=100: is not a multiple of"),
            ([{"from_step": 5, "sequence_length": 512}], r"sequence_length=512: .*micro_batch_size to a multiple of 8"),
        ],
    )
    def test_invalid_stages_are_refused(
        self, corpus: TokenisedCorpus, stages: list[dict[str, Any]], message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            data_config(corpus, stages=stages).check_stages(micro_batch_size=4)
