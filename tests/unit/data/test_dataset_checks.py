"""Datasets that do not match the settings are refused in one line before they are built."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypermoe_ds.config import validate
from hypermoe_ds.data.dataset_checks import check_datasets
from hypermoe_ds.data.settings import DataConfig, DatasetConfig, StageConfig
from hypermoe_ds.data.tokenizer import load_tokenizer, vocabulary_file
from hypermoe_ds.errors import UserError
from tests.helpers.corpus import TokenisedCorpus, write_token_files
from tests.helpers.datasets import training_set

VOCAB = 1000


@pytest.fixture
def config(corpus: TokenisedCorpus, tmp_path: Path) -> DataConfig:
    """Return data settings for a copy of the corpus that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(corpus.tokenizer.parent, folder, ignore=shutil.ignore_patterns("cache"))
    return recipe(folder)


def recipe(folder: Path, **changes: Any) -> DataConfig:
    plain = {
        "train": [{"prefix": f"{folder}/train"}],
        "valid": [{"prefix": f"{folder}/valid"}],
        "sequence_length": 64,
        "tokenizer": f"{folder}/tokenizer",
        **changes,
    }
    return validate(DataConfig, plain, "recipe")


def cut(name: str, end: int | None) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def extend(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\0")


def change(name: str, **values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def test_intact_datasets_pass(config: DataConfig) -> None:
    check_datasets(config, VOCAB)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train.bin").unlink(), r"train\.bin: no such file"),
        (lambda folder: (folder / "valid.idx").unlink(), r"valid\.idx: no such file"),
        (cut("train.bin", -1), r"train\.bin: is truncated \(\d+ bytes instead of \d+\)"),
        (cut("train.bin", 0), r"train\.bin: is truncated \(0 bytes"),
        (extend("train.bin"), r"train\.bin: is damaged"),
        (cut("valid.idx", -1), r"valid\.idx: is truncated"),
        (cut("valid.idx", 20), r"valid\.idx: is truncated \(20 bytes\)"),
        (extend("valid.idx"), r"valid\.idx: is damaged"),
        (lambda folder: (folder / "valid.idx").write_bytes(b"x" * 99), r"valid\.idx: is not a token index"),
        (lambda folder: (folder / "train.json").write_text("{"), r"train\.json: is not metadata of token files"),
        (change("train.json", colour="red"), r"train\.json: is not metadata of token files"),
        (change("valid.json", tokenizer_sha256="0"), r"valid: was made with another .*, whose tokenizer\.model"),
        (
            change("valid.json", tokenizer_file="tokenizer.json"),
            r"valid: was made with another tokenizer than .*, which has no tokenizer\.json",
        ),
        (
            change("valid.json", eos_id=7),
            r"another tokenizer than .*, with 1000 token ids and end-of-sequence token 7 instead of 1000 and 2",
        ),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer: no such tokenizer folder"),
    ],
)
def test_damaged_files_are_refused_by_name(
    config: DataConfig, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(tmp_path / "copy")
    with pytest.raises(UserError, match=message):
        check_datasets(config, VOCAB)


def test_the_same_vocabulary_in_another_tokenizer_format_is_a_different_tokenizer(
    config: DataConfig, tmp_path: Path
) -> None:
    load_tokenizer(config.tokenizer).save_pretrained(tmp_path / "saved")
    assert vocabulary_file(tmp_path / "saved").name == "tokenizer.json"
    with pytest.raises(UserError, match=r"train: was made with another tokenizer .*, which has no tokenizer\.model;"):
        check_datasets(config.model_copy(update={"tokenizer": str(tmp_path / "saved")}), VOCAB)


def test_a_second_vocabulary_file_that_takes_precedence_makes_a_different_tokenizer(
    config: DataConfig, tmp_path: Path
) -> None:
    load_tokenizer(config.tokenizer).save_pretrained(tmp_path / "both")
    content = json.loads((tmp_path / "both" / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "both" / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(Path(config.tokenizer) / "tokenizer.model", tmp_path / "both")
    with pytest.raises(UserError, match=r", which is loaded from tokenizer\.json, not from tokenizer\.model;"):
        check_datasets(config.model_copy(update={"tokenizer": str(tmp_path / "both")}), VOCAB)


def test_a_tokenizer_with_the_same_vocabulary_but_different_encoding_is_refused(
    config: DataConfig, tmp_path: Path
) -> None:
    change("tokenizer/tokenizer_config.json", add_prefix_space=True, model_max_length=512)(tmp_path / "copy")
    with pytest.raises(UserError, match=r"another tokenizer .*, which encodes text differently .*; set data.tokenizer"):
        check_datasets(config, VOCAB)
    change("train.json", encoding_sha256="")(tmp_path / "copy")  # as in files written by earlier versions
    change("valid.json", encoding_sha256="")(tmp_path / "copy")
    check_datasets(config, VOCAB)


def test_a_replaced_token_file_of_the_same_size_is_refused(config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "copy/train.bin"
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[::-1].tofile(path)
    with pytest.raises(UserError, match=r"train\.bin: is not the file that .*train\.json describes; restore it"):
        check_datasets(config, VOCAB)
    change("train.json", bin_digest="")(tmp_path / "copy")  # as in files written by earlier versions
    check_datasets(config, VOCAB)


def test_files_with_other_tokens_have_another_data_order(config: DataConfig, tmp_path: Path) -> None:
    before = training_set(config, 8).stage_start(0)
    path = tmp_path / "copy/train.bin"
    np.fromfile(path, dtype=np.uint16)[::-1].tofile(path)
    with pytest.raises(UserError, match=r"the datasets of data\.train or their content"):
        training_set(config, 8, resumed=before, consumed=4)


def test_masked_documents_must_end_with_the_end_of_sequence_token(config: DataConfig, tmp_path: Path) -> None:
    masked = config.model_copy(update={"document_mask": True})
    check_datasets(masked, VOCAB)
    write_token_files(f"{tmp_path}/other", [[5, 6, 7] * 50])
    other = masked.model_copy(update={"train": recipe(tmp_path, train=[{"prefix": f"{tmp_path}/other"}]).train})
    with pytest.raises(
        UserError, match=r"other\.bin: ends with token 7 instead of the end-of-sequence token 2; end each"
    ):
        check_datasets(other, VOCAB)


def test_tokenizer_settings_that_change_no_id_are_ignored(config: DataConfig, tmp_path: Path) -> None:
    change("tokenizer/tokenizer_config.json", model_max_length=512, chat_template="{{ messages }}")(tmp_path / "copy")
    check_datasets(config, VOCAB)


def test_token_ids_beyond_the_vocabulary_of_the_model_are_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"tokenizer: has token ids up to 999, but the model has 999 embeddings; set model\.vocab_size to",
    ):
        check_datasets(config, VOCAB - 1)
    change("train.json", vocab_size=1001)(tmp_path / "copy")
    with pytest.raises(UserError, match=r"made with another tokenizer .*, with 1001 token ids .*; set data\.tokenizer"):
        check_datasets(config, VOCAB)


def test_token_files_without_metadata_are_searched_for_the_largest_id(config: DataConfig, tmp_path: Path) -> None:
    write_token_files(f"{tmp_path}/plain", [[5, 1040, 2] * 50])
    plain = config.model_copy(
        update={"train": recipe(tmp_path, train=[{"prefix": f"{tmp_path}/plain"}]).train, "valid": []}
    )
    check_datasets(plain, 1041)
    with pytest.raises(UserError, match="has token ids up to 1040, but the model has 1040"):
        check_datasets(plain, 1040)


@pytest.mark.parametrize("tokens", [64, 65])
def test_too_few_tokens_for_a_sample_are_refused(config: DataConfig, tmp_path: Path, tokens: int) -> None:
    write_token_files(f"{tmp_path}/short", [[1] * tokens])
    short = config.model_copy(update={"train": recipe(tmp_path, train=[{"prefix": f"{tmp_path}/short"}]).train})
    if tokens == 65:
        check_datasets(short, VOCAB)
        assert len(training_set(short, 1)) == 1
        return
    for refuse in (lambda: check_datasets(short, VOCAB), lambda: training_set(short, 1)):
        with pytest.raises(UserError, match="short: has 64 tokens, but one sample needs 65"):
            refuse()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "train"),
        ({"train": [{"prefix": "a", "weight": 0}]}, r"train\.0\.weight=0"),
        ({"train": [{"prefix": "a", "weight": float("inf")}]}, r"train\.0\.weight"),
        ({"train": [{"prefx": "a"}]}, "did you mean 'prefix'"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(tmp_path, **changes)


def test_every_setting_has_a_description() -> None:
    for section in (DataConfig, DatasetConfig, StageConfig):
        assert all(setting.description for setting in section.model_fields.values())
