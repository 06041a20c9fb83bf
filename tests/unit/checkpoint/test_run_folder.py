"""A run folder stores the settings of its run, and a run cannot continue with a different model."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from hypermoe_ds.checkpoint.run_folder import RunFolder, model_fields, refuse_other_model
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig

FIELDS: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
LAYOUT: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "expert_parallel": {"autoep_size": 2},
    "zero_optimization": {"stage": 1},
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes(b"pieces")
    run = RunFolder(tmp_path / "run")
    run.write_settings({"run": {"dir": "x"}, "train": {"steps": 3}}, LAYOUT, HyperMoEConfig(**FIELDS), tokenizer)
    return run


def test_written_settings_are_read_back(run: RunFolder) -> None:
    assert run.exists()
    assert run.read_settings() == {"run": {"dir": "x"}, "train": {"steps": 3}}
    assert json.loads(run.ds_config.read_text()) == LAYOUT
    assert (run.tokenizer / "tokenizer.model").read_bytes() == b"pieces"
    written, given = run.model_config().to_dict(), HyperMoEConfig(**FIELDS).to_dict()
    assert {key: written[key] for key in given if key != "transformers_version"} == {
        key: value for key, value in given.items() if key != "transformers_version"
    }


def test_settings_can_be_rewritten_with_the_tokenizer_of_the_folder(run: RunFolder) -> None:
    run.write_settings({"run": {"dir": "y"}}, {}, HyperMoEConfig(**FIELDS), run.tokenizer)
    assert run.read_settings() == {"run": {"dir": "y"}}
    assert (run.tokenizer / "tokenizer.model").read_bytes() == b"pieces"


def test_the_tokenizer_of_the_first_launch_is_kept(run: RunFolder, tmp_path: Path) -> None:
    run.check_same_tokenizer(tmp_path / "tokenizer")
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    for name, path in (("tokenizer.json", other), ("tokenizer.model", tmp_path / "tokenizer")):
        (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(b"other pieces")
        with pytest.raises(UserError, match=rf"={path}: differs from the run's tokenizer, .* \({name} differs\);"):
            run.check_same_tokenizer(path)
        run.write_settings({}, {}, HyperMoEConfig(**FIELDS), path)
        assert [file.name for file in run.tokenizer.iterdir()] == ["tokenizer.model"]
        assert (run.tokenizer / "tokenizer.model").read_bytes() == b"pieces"


def test_a_new_run_accepts_any_tokenizer(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").check_same_tokenizer(tmp_path / "anything")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.exists()
    with pytest.raises(UserError, match=r"is not a run folder .*; give a run.dir"):
        run.model_config()
    run.check_same_model(HyperMoEConfig(**FIELDS))


@pytest.mark.parametrize(
    ("field", "value", "there"),
    [
        ("num_experts", 8, 4),
        ("hypernetwork", False, True),
        ("rope_theta", 5000.0, 10000.0),
        ("router_aux_loss_coef", 0.5, 0.01),
        ("router_aux_loss_scope", "data_parallel", "micro_batch"),
        ("tie_word_embeddings", False, True),
    ],
)
def test_a_different_model_is_refused_with_the_name_of_the_field(
    run: RunFolder, field: str, value: object, there: object
) -> None:
    expected = f"model.{field}={value!r}: differs from {there!r} in the run folder {run.path}; "
    with pytest.raises(UserError, match=re.escape(expected)):
        run.check_same_model(HyperMoEConfig(**{**FIELDS, field: value}))


def test_fields_missing_in_an_older_checkpoint_are_not_compared(tmp_path: Path) -> None:
    now = model_fields(HyperMoEConfig(**FIELDS))
    before = {key: value for key, value in now.items() if key != "router_dtype"}
    refuse_other_model(now, before, tmp_path)
    with pytest.raises(UserError, match=r"model.num_experts=4: differs from 8 in the run folder "):
        refuse_other_model(now, {**before, "num_experts": 8}, tmp_path)


def test_only_the_tokenizer_of_a_model_folder_is_kept(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (model / name).touch()
    run = RunFolder(tmp_path / "run")
    run.write_settings({}, LAYOUT, HyperMoEConfig(**FIELDS), model)
    assert {path.name for path in run.tokenizer.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_the_same_model_is_accepted(run: RunFolder) -> None:
    run.check_same_model(HyperMoEConfig(**FIELDS))
    run.check_same_model(run.model_config())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", 200_000 * b"[", b'{"hidden_size": "wide"}'])
def test_a_damaged_configuration_is_refused_in_one_line_and_can_be_deleted(run: RunFolder, content: bytes) -> None:
    (run.model / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json: is damaged \(.*; restore it, or remove it: the next"):
        run.check_same_model(HyperMoEConfig(**FIELDS))
    (run.model / "config.json").unlink()
    run.check_same_model(HyperMoEConfig(**FIELDS))


def test_settings_are_written_atomically(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: run.write_model(HyperMoEConfig(**{**FIELDS, "num_experts": 8})),
        lambda: run.write_settings({"run": {"dir": "y"}}, {}, HyperMoEConfig(**FIELDS), run.tokenizer),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert {path: path.read_bytes() for path in before} == before
