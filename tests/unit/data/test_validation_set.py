"""Test that validation reads each dataset once, in an order that no training setting changes."""

import numpy as np

from hypermoe_ds.data.settings import DatasetConfig
from hypermoe_ds.data.validation_set import build_validation_sets
from tests.helpers.corpus import TokenisedCorpus
from tests.helpers.datasets import rows

S = 64


def test_every_complete_sequence_is_read_once(corpus: TokenisedCorpus) -> None:
    [dataset] = build_validation_sets([DatasetConfig(prefix=corpus.valid)], S, None).values()
    stream = np.fromfile(f"{corpus.valid}.bin", dtype=np.uint16).tolist()
    count = (len(stream) - 1) // S
    cuts = [
        sorted(tuple(stream[start : start + S + 1]) for start in range(shift, shift + count * S, S))
        for shift in range(len(stream) - count * S)
    ]
    assert sorted(rows(dataset)) in cuts


def test_each_dataset_is_read_once_regardless_of_its_weight(corpus: TokenisedCorpus) -> None:
    datasets = [DatasetConfig(prefix=corpus.valid, weight=0.01), DatasetConfig(prefix=corpus.train, weight=5)]
    both = build_validation_sets(datasets, S, None)
    assert list(both) == ["valid", "train"]
    for dataset, found in zip(datasets, both.values(), strict=True):
        [alone] = build_validation_sets([dataset], S, None).values()
        assert rows(found) == rows(alone)


def test_the_limit_is_split_in_proportion_to_dataset_lengths(corpus: TokenisedCorpus) -> None:
    datasets = [DatasetConfig(prefix=corpus.valid, name="v"), DatasetConfig(prefix=corpus.train, name="t")]
    unlimited = build_validation_sets(datasets, S, None)
    lengths = {name: len(dataset) for name, dataset in unlimited.items()}
    total = sum(lengths.values())
    for limit in (total // 2, 10, 1):
        found = build_validation_sets(datasets, S, limit)
        assert {name: len(dataset) for name, dataset in found.items()} == {
            name: max(limit * length // total, 1) for name, length in lengths.items()
        }
        for name, dataset in found.items():
            assert rows(dataset) == rows(unlimited[name], len(dataset))
    for limit in (total, total + 1):
        assert {name: len(part) for name, part in build_validation_sets(datasets, S, limit).items()} == lengths


def test_no_datasets_give_no_validation() -> None:
    assert build_validation_sets([], S, None) == {}
