"""Test the consumed tokens and epochs of each dataset against a sample-by-sample count."""

from collections import Counter
from pathlib import Path

import pytest

from hypermoe_ds.data.consumption import Consumption
from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.data.training_set import TrainingSet
from tests.helpers.corpus import TokenisedCorpus, write_token_files
from tests.helpers.datasets import data_config, training_set

S, SAMPLES = 16, 200
SKIPPED = [[3, 9], [50, 50], [120, 140]]


def build(corpus: TokenisedCorpus, folder: Path, datasets: int) -> TrainingSet:
    weights = [3.0, 1.0, 0.5][:datasets]
    for number in range(datasets):  # each dataset uses different token ids
        write_token_files(f"{folder}/d{number}", [[100 * number + 5] * 90 for _ in range(10)])
    train = [{"prefix": f"{folder}/d{n}", "weight": weight} for n, weight in enumerate(weights)]
    return training_set(data_config(corpus, train=train, sequence_length=S), SAMPLES)


@pytest.mark.parametrize("datasets", [1, 3])
@pytest.mark.parametrize("skipped", [[], SKIPPED])
def test_totals_equal_a_count_of_single_samples(
    corpus: TokenisedCorpus, tmp_path: Path, datasets: int, skipped: list[list[int]]
) -> None:
    samples = build(corpus, tmp_path, datasets)
    counting = Consumption(samples, SkippedSamples(skipped))
    dataset_of_sample = [int(samples[index]["tokens"][1]) // 100 for index in range(SAMPLES)]
    skipped_indices = {index for first, last in skipped for index in range(first, last + 1)}
    for consumed in (0, 5, 5, 64, 131, SAMPLES):
        seen = Counter(dataset_of_sample[index] for index in range(consumed) if index not in skipped_indices)
        values = counting.at(consumed)
        assert values.pop("consumed_tokens") == sum(seen.values()) * S
        for number in range(datasets):
            assert values.pop(f"consumed_tokens/d{number}") == seen[number] * S
            assert values.pop(f"epochs/d{number}") == pytest.approx(seen[number] * S / 900)
        assert values == {}


def test_a_resumed_run_reports_the_same_totals_as_an_uninterrupted_run(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    samples = build(corpus, tmp_path, 3)
    uninterrupted, resumed = (Consumption(samples, SkippedSamples(SKIPPED)) for _ in range(2))
    for consumed in range(0, 151, 50):
        expected = uninterrupted.at(consumed)
    assert resumed.at(150) == expected


def test_shares_give_the_tokens_and_epochs_at_the_end_of_the_run(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    samples = build(corpus, tmp_path, 3)
    values = Consumption(samples, SkippedSamples()).at(SAMPLES)
    for share in samples.shares():
        assert share.tokens == 900
        assert share.epochs == values[f"epochs/{share.name}"]
        assert share.weight == values[f"consumed_tokens/{share.name}"] / (SAMPLES * S)
