"""Test the share of each dataset that a run reads."""

from pathlib import Path

import pytest

from hypermoe_ds.data.settings import DatasetConfig
from hypermoe_ds.data.shares import dataset_shares, shares
from tests.helpers.corpus import write_token_files


def test_epochs_are_tokens_read_divided_by_dataset_size() -> None:
    books, web = shares(["books", "web"], [1000, 50_000], [1.0, 3.0], 20_000)
    assert (books.weight, books.epochs) == (0.25, 5.0)  # 5,000 tokens read from 1,000
    assert (web.weight, web.epochs) == (0.75, pytest.approx(0.3))  # 15,000 tokens read from 50,000


def test_names_and_sizes_come_from_the_token_files(tmp_path: Path) -> None:
    write_token_files(str(tmp_path / "books"), [[1, 2, 3] * 10, [4] * 10])
    write_token_files(str(tmp_path / "web"), [[1] * 60])
    datasets = [DatasetConfig(prefix=str(tmp_path / "books")), DatasetConfig(prefix=str(tmp_path / "web"), name="net")]
    found = dataset_shares(datasets, 200)
    assert [(share.name, share.tokens, share.weight) for share in found] == [("books", 40, 0.5), ("net", 60, 0.5)]
    assert [share.epochs for share in found] == [pytest.approx(100 / 40), pytest.approx(100 / 60)]
