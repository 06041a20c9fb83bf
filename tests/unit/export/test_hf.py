"""A Hugging Face folder appears whole or not at all."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hypermoe_ds import modeling
from hypermoe_ds.data.tokenizer import train_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.export import hf
from hypermoe_ds.export.hf import check_output, export, read_model
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from tests.helpers.corpus import stdlib_texts

VOCABULARY = 300


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "tokenizer"
    train_tokenizer(stdlib_texts(1), VOCABULARY + 50, folder)
    return folder


@pytest.fixture
def model() -> HyperMoEForCausalLM:
    torch.manual_seed(1)
    sizes: dict[str, Any] = dict.fromkeys(
        ("expert_embedding_size", "selection_hidden_size", "hypernetwork_input_size", "bottleneck_size"), 2
    )
    config = HyperMoEConfig(
        vocab_size=VOCABULARY + 50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        moe_intermediate_size=4, num_experts=2, adapter_size=2, **sizes,
    )  # fmt: skip
    return HyperMoEForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_to_the_bit_in_its_precision(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    output = tmp_path / "new" / "hf"
    export(model.to(dtype), tokenizer, output)
    back = read_model(output)
    assert back.dtype == dtype
    assert not back.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert [path.name for path in output.parent.iterdir()] == ["hf"]


def test_a_folder_holds_weights_code_and_tokenizer_and_names_the_tokens(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "hf"
    export(model, tokenizer, output)
    names = {path.name for path in output.iterdir()}
    code = {path.name for path in Path(modeling.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert names >= code | {"config.json", "generation_config.json", "model.safetensors"}
    for file in tokenizer.iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hypermoe.HyperMoEForCausalLM"


def test_an_empty_folder_may_be_filled_and_anything_else_is_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").touch()
    for name in ("file", "full"):
        with pytest.raises(UserError, match=rf"{name}: exists already; remove it or choose another folder$"):
            check_output(tmp_path / name)


def test_a_taken_place_is_refused_before_anything_is_written(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis").write_text("years of work")
    with pytest.raises(UserError, match="exists already"):
        export(model, tokenizer, tmp_path / "hf")
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "thesis"]


def test_weights_that_do_not_read_back_leave_nothing_behind(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupted(folder: Path) -> HyperMoEForCausalLM:
        back = read_model(folder)
        with torch.no_grad():
            back.model.layers[1].mlp.experts.down_proj[1, 0, 0].mul_(1.001)
        return back

    monkeypatch.setattr(hf, "read_model", corrupted)
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.experts\.down_proj does not read back"):
        export(model, tokenizer, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing_behind(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        (Path(folder) / "half").touch()
        raise OSError("disk is gone")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk is gone"):
        export(model, tokenizer, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_an_export_asks_for_the_room_of_its_weights(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"hf: needs 0.00 GiB and 0.00 are free; free some disk"):
        export(model, tokenizer, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no Hugging Face folder \(no config.json\); make one with"):
        read_model(tmp_path)
