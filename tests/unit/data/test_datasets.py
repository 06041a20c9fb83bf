"""Test that samples are slices of the token stream, in an order that the settings determine."""

from collections import Counter
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hypermoe_ds.config import validate
from hypermoe_ds.data.datasets import SequenceDataset, _cache_errors, build_datasets
from hypermoe_ds.data.loader import build_loader
from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.errors import UserError
from tests.helpers.corpus import TokenisedCorpus, write_token_files

S = 64
EOS = 2


def settings(corpus: TokenisedCorpus, **changes: Any) -> DataConfig:
    values = {
        "train": [{"prefix": corpus.train}],
        "valid": [{"prefix": corpus.valid}],
        "sequence_length": S,
        "tokenizer": str(corpus.tokenizer),
        **changes,
    }
    return validate(DataConfig, values, "recipe")


def build_train(config: DataConfig, samples: int, seed: int = 1) -> SequenceDataset:
    return build_datasets(config, seed, samples, None)[0]


def build_valid(config: DataConfig, limit: int | None = None, seed: int = 1, train_samples: int = 8) -> SequenceDataset:
    [valid] = build_datasets(config, seed, train_samples, limit)[1].values()
    return valid


def rows(dataset: SequenceDataset, count: int | None = None) -> list[tuple[int, ...]]:
    """Return the first `count` samples, or all, each as S tokens and the token that follows them."""
    samples = [dataset[index] for index in range(len(dataset) if count is None else count)]
    return [(*sample["tokens"].tolist(), int(sample["labels"][-1])) for sample in samples]


def stream(prefix: str) -> list[int]:
    tokens: list[int] = np.fromfile(f"{prefix}.bin", dtype=np.uint16).tolist()
    return tokens


def documents(prefix: str) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in stream(prefix):
        found[-1].append(token)
        if token == EOS:
            found.append([])
    assert found.pop() == []
    return found


def test_labels_are_the_next_tokens(corpus: TokenisedCorpus) -> None:
    train, valid = build_datasets(settings(corpus), 1, 50, None)
    for dataset in (train, *valid.values()):
        for sample in (dataset[index] for index in range(len(dataset))):
            assert sample.keys() == {"tokens", "labels"}
            assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
            assert sample["tokens"].shape == sample["labels"].shape == (S,)
            assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])


def test_samples_are_slices_of_the_concatenated_documents(corpus: TokenisedCorpus) -> None:
    samples = Counter(rows(build_valid(settings(corpus))))
    parts = documents(corpus.valid)
    assert len(parts) == 4

    def cuts(order: tuple[list[int], ...]) -> Counter[tuple[int, ...]]:
        tokens = [token for document in order for token in document]
        return Counter(tuple(tokens[start : start + S + 1]) for start in range(0, len(tokens) - S, S))

    assert [cuts(order) == samples for order in permutations(parts)].count(True) == 1


def test_an_epoch_contains_every_token_once(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    lengths = [1, 700, 3, 3, 250, 64, 65, 1, 90]
    numbers = iter(range(10_000))
    write_token_files(f"{tmp_path}/t", [[next(numbers) for _ in range(length)] for length in lengths], large=True)
    total, dataset_config = sum(lengths), [{"prefix": f"{tmp_path}/t"}]
    epoch = (total - 1) // S
    for dataset in (
        build_train(settings(corpus, train=dataset_config), epoch),
        build_valid(settings(corpus, train=dataset_config, valid=dataset_config)),
    ):
        assert len(dataset) == epoch
        seen = [token for row in rows(dataset) for token in row[:-1]]
        assert len(set(seen)) == len(seen) == epoch * S
        assert set(seen) <= set(range(total))


@pytest.mark.parametrize("datasets", [1, 2])
def test_describe_sample_names_the_documents_of_its_tokens(
    corpus: TokenisedCorpus, tmp_path: Path, datasets: int
) -> None:
    names = [f"{tmp_path}/{number}" for number in range(datasets)]
    for number_of_dataset, name in enumerate(names):  # each document repeats its own token id
        write_token_files(name, [[100 * number_of_dataset + number] * (20 + 9 * number) for number in range(30)])
    dataset = build_train(settings(corpus, train=[{"prefix": name} for name in names]), 40)
    for index in range(40):
        tokens = [*dataset[index]["tokens"].tolist(), int(dataset[index]["labels"][-1])]
        expected = sorted({token % 100 for token in tokens})
        assert (
            dataset.describe_sample(index) == f"document {', '.join(map(str, expected))} of {names[tokens[0] // 100]}"
        )


def test_the_seed_determines_the_training_order(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    first, again, other = (
        build_train(settings(corpus, cache=str(tmp_path / name)), 300, seed)
        for name, seed in (("a", 1), ("b", 1), ("b", 2))
    )
    assert rows(first) == rows(again) != rows(other)
    assert first.data_order_hash == again.data_order_hash != other.data_order_hash


def test_validation_samples_do_not_depend_on_the_seed_or_run_length(corpus: TokenisedCorpus) -> None:
    all_samples = rows(build_valid(settings(corpus)))
    assert rows(build_valid(settings(corpus), seed=7, train_samples=900)) == all_samples
    assert rows(build_valid(settings(corpus), limit=5)) == all_samples[:5]
    assert rows(build_valid(settings(corpus), limit=10**9)) == all_samples
    assert build_datasets(settings(corpus, valid=[]), 1, 8, None)[1] == {}


def test_validation_reads_every_dataset_once_regardless_of_its_weight(corpus: TokenisedCorpus) -> None:
    datasets = [{"prefix": corpus.valid, "weight": 0.01}, {"prefix": corpus.train, "weight": 5}]
    both = build_datasets(settings(corpus, valid=datasets), 1, 8, None)[1]
    separate = [rows(build_valid(settings(corpus, valid=[dataset]))) for dataset in datasets]
    assert [rows(dataset) for dataset in both.values()] == separate


def test_the_validation_limit_is_split_in_proportion_to_dataset_lengths(
    corpus: TokenisedCorpus,
) -> None:
    config = settings(corpus, valid=[{"prefix": corpus.valid, "name": "v"}, {"prefix": corpus.train, "name": "t"}])
    unlimited = build_datasets(config, 1, 8, None)[1]
    lengths = {name: len(dataset) for name, dataset in unlimited.items()}
    total = sum(lengths.values())
    for limit in (total // 2, 10, 1):
        found = build_datasets(config, 1, 8, limit)[1]
        assert {name: len(dataset) for name, dataset in found.items()} == {
            name: max(limit * length // total, 1) for name, length in lengths.items()
        }
        for name, dataset in found.items():
            assert rows(dataset) == rows(unlimited[name], len(dataset))
    for limit in (total, total + 1):
        assert {name: len(part) for name, part in build_datasets(config, 1, 8, limit)[1].items()} == lengths


def test_the_data_order_hash_changes_when_a_longer_run_changes_the_order(corpus: TokenisedCorpus) -> None:
    epoch = (len(stream(corpus.train)) - 1) // S
    lengths = (epoch // 4, epoch, epoch * 3 // 2, epoch * 2)
    quarter, one, half_more, two = (build_train(settings(corpus), length) for length in lengths)
    assert [len(run) for run in (quarter, one, half_more, two)] == list(lengths)
    beginning = rows(quarter)
    for run in (one, half_more, two):
        assert (run.data_order_hash == quarter.data_order_hash) == (rows(run, len(beginning)) == beginning)
    assert one.data_order_hash == quarter.data_order_hash, "both runs stay within the first epoch"
    assert half_more.data_order_hash != quarter.data_order_hash, "the longer run reaches the second epoch"


def test_datasets_are_interleaved_in_proportion_to_their_weights(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    weights, prefixes = {"a": 6, "b": 1.5, "c": 2.5}, {}
    for number, name in enumerate(weights):
        prefixes[name] = f"{tmp_path}/{name}"
        write_token_files(prefixes[name], [[number] * (50 + 10 * length) for length in range(40)])
    datasets = [{"prefix": prefixes[name], "weight": weight} for name, weight in weights.items()]
    drawn = np.array([row[0] for row in rows(build_train(settings(corpus, train=datasets), 1000))])
    for start in range(0, 1000, 100):
        counts = np.bincount(drawn[start : start + 100], minlength=3)
        assert np.abs(counts - [60, 15, 25]).max() <= 2
    assert np.abs(np.bincount(drawn) - [600, 150, 250]).max() <= 1


def test_a_pad_token_in_the_data_is_kept(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    write_token_files(f"{tmp_path}/t", [[3] * 200])
    assert rows(build_train(settings(corpus, train=[{"prefix": f"{tmp_path}/t"}]), 1)) == [(3,) * (S + 1)]


def test_the_index_is_rebuilt_when_token_files_are_replaced(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    datasets = [{"prefix": f"{tmp_path}/t"}]
    for lengths in ((300, 100), (100, 300)):
        write_token_files(f"{tmp_path}/t", [[length] * length for length in lengths])
        assert len(rows(build_train(settings(corpus, train=datasets, valid=[]), 6))) == 6
    assert len(list((tmp_path / "cache").glob("*-document_index.npy"))) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_after_the_consumed_samples(corpus: TokenisedCorpus, workers: int) -> None:
    dataset = build_train(settings(corpus), 40)
    expected = rows(dataset)
    batches = build_loader(dataset, 3, rank=1, size=2, consumed_samples=12, workers=workers, vocab_size=10**6)
    for start in (15, 21, 27):
        batch = next(batches)
        found = torch.cat((batch["input_ids"], batch["labels"][:, -1:]), dim=1).tolist()
        assert list(map(tuple, found)) == expected[start : start + 3]


def test_indices_outside_the_dataset_are_refused(corpus: TokenisedCorpus) -> None:
    dataset = build_train(settings(corpus), 5)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"sample {index} of 5"):
            dataset[index]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot be written or read"),
        (b"\x93NUMPY", "cannot be written or read"),
        (b"junk" * 50, "written or read"),
    ],
)
def test_a_damaged_cache_is_reported(corpus: TokenisedCorpus, tmp_path: Path, content: bytes, problem: str) -> None:
    config = settings(corpus, cache=str(tmp_path / "cache"))
    build_train(config, 5)
    for path in (tmp_path / "cache").glob("*-shuffle_index.npy"):
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.cache={tmp_path}/cache: the indices {problem}|{problem}"):
        build_train(config, 5)


def test_a_cache_that_cannot_be_written_is_reported(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"file/cache: the indices cannot be written"):
        build_train(settings(corpus, cache=str(tmp_path / "file" / "cache")), 5)


def _build_on_rank(rank: int, store: Path, config: DataConfig, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    train, valid = build_datasets(config, 1, 60, None)
    queue.put((rank, rows(train), {name: rows(part) for name, part in valid.items()}, train.data_order_hash))
    dist.destroy_process_group()


def test_all_ranks_build_the_same_datasets_as_one_process(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    both = [{"prefix": corpus.train, "weight": 2}, {"prefix": corpus.valid}]
    config = settings(corpus, train=both, valid=both, cache=str(tmp_path / "ranks"))
    context = get_context("fork")  # forked ranks inherit the imported libraries
    queue: Any = context.SimpleQueue()
    ranks = [
        context.Process(target=_build_on_rank, args=(rank, tmp_path / "store", config, queue)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = sorted(queue.get() for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    train, valid = build_datasets(config.model_copy(update={"cache": str(tmp_path / "single")}), 1, 60, None)
    parts = {name: rows(part) for name, part in valid.items()}
    assert found == [(rank, rows(train), parts, train.data_order_hash) for rank in range(2)]


def test_a_rank_that_cannot_read_the_cache_is_reported(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    """Simulate a node whose disk lacks the files that rank 0 wrote."""
    context = get_context("fork")
    queue: Any = context.SimpleQueue()
    store = tmp_path / "store"
    ranks = [
        context.Process(
            target=_build_or_report_error, args=(rank, store, settings(corpus, cache=str(tmp_path / str(rank))), queue)
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    message = queue.get()
    for process in ranks:
        process.kill()
    assert f"data.cache={tmp_path}/1: the indices cannot be written or read" in message
    assert "set data.cache to a folder that all nodes share" in message


def _build_or_report_error(rank: int, store: Path, config: DataConfig, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        build_datasets(config, 1, 60, None)
    except UserError as error:
        queue.put(str(error))


def wrapped(cause: Exception) -> Exception:
    """Wrap an error as megatron-core does under torch.distributed."""
    error = Exception("failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [MemoryError("bad_alloc"), wrapped(MemoryError("bad_alloc"))])
def test_an_index_larger_than_memory_is_refused(error: Exception) -> None:
    message = r"^train\.steps: the index of the samples does not fit into memory"
    with pytest.raises(UserError, match=message), _cache_errors("cache"):
        raise error
