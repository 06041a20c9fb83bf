"""Training continues from a run that was initialised from given weights; a failed initialisation leaves no run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import Tensor

from hypermoe_ds.checkpoint.init_from_weights import init_from_weights
from hypermoe_ds.checkpoint.manifest import Manifest
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.weights import load_model
from hypermoe_ds.data.tokenizer import train_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.run_config import RunConfig, model_section
from hypermoe_ds.training.state import TrainState
from tests.helpers.corpus import stdlib_texts

CONFIG = HyperMoEConfig(
    vocab_size=350, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    moe_intermediate_size=4, num_experts=2, rope_theta=5e5, rms_norm_eps=1e-6, qk_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new_run") / "tokenizer"
    train_tokenizer(stdlib_texts(1), 350, folder)
    (folder / "model.safetensors").write_text("weights beside the tokenizer")
    return folder


@pytest.fixture
def model() -> HyperMoEForCausalLM:
    torch.manual_seed(2)
    return HyperMoEForCausalLM(CONFIG)


def write(output: Path, weights: Iterator[tuple[str, Tensor]], tokenizer: Path) -> RunFolder:
    settings = {"model": model_section(CONFIG), "train": {"precision": "bf16"}}
    return init_from_weights(output, CONFIG, weights, tokenizer, settings, TrainState().to_dict())


def test_a_new_run_has_the_weights_at_step_0_and_no_moments(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    run = write(tmp_path / "runs" / "new", model.named_parameters(), tokenizer)
    manifest = Manifest.read(run.checkpoints / (run.checkpoints / "latest").read_text().strip())
    assert (manifest.step, manifest.kinds) == (0, ("weight",))
    assert TrainState.from_dict(manifest.state["run"]) == TrainState()
    assert manifest.settings["train"] == {"precision": "bf16"}
    expected = model.to(torch.bfloat16).state_dict()
    for name, tensor in load_model(run).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["new"]


def test_the_written_model_section_builds_the_same_model(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    run = write(tmp_path / "new", model.named_parameters(), tokenizer)
    recipe = yaml.safe_load(run.model_section.read_text()) | {
        "run": {"dir": str(run.path)},
        "data": {"train": [{"prefix": "x"}], "sequence_length": 8, "tokenizer": str(run.tokenizer)},
        "train": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "optimizer": {"lr": 1e-3},
    }
    run.check_same_model(RunConfig.model_validate(recipe).build_model_config())
    assert recipe["model"] == json.loads(json.dumps(model_section(CONFIG)))


def test_only_the_tokenizer_files_of_a_folder_are_copied(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    run = write(tmp_path / "new", model.named_parameters(), tokenizer)
    assert {path.name for path in run.tokenizer.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    for path in run.tokenizer.iterdir():
        assert path.read_bytes() == (tokenizer / path.name).read_bytes()


def test_a_failed_initialisation_leaves_no_files(model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path) -> None:
    def cut_off() -> Iterator[tuple[str, Tensor]]:
        yield from list(model.named_parameters())[:3]
        raise UserError("lm_head.weight", "is missing", "copy the folder again")

    with pytest.raises(UserError, match="is missing"):
        write(tmp_path / "new", cut_off(), tokenizer)
    with pytest.raises(UserError, match="has no tokenizer"):
        write(tmp_path / "new", model.named_parameters(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_and_a_full_disk_are_refused(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken: exists already"):
        write(tmp_path / "taken", model.named_parameters(), tokenizer)
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"new: needs 0.00 GiB, but 0.00 GiB are free; free disk space"):
        write(tmp_path / "new", model.named_parameters(), tokenizer)
