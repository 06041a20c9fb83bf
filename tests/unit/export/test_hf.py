"""A Hugging Face folder is written completely or not at all."""

import json
import shutil
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hypermoe_ds import modeling
from hypermoe_ds.data.tokenizer import train_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.export import hf
from hypermoe_ds.export.bake import bake_weights
from hypermoe_ds.export.hf import export, load_any, read_model, shard_bytes_of
from hypermoe_ds.export.weight_loader import LazyWeights, weights_of
from hypermoe_ds.files import check_output
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from tests.helpers.corpus import stdlib_texts

VOCABULARY = 300
ONE_SHARD = 10**9


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
def test_an_exported_model_loads_bit_for_bit_in_its_dtype(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    output = tmp_path / "new" / "hf"
    export(weights_of(model.to(dtype)), tokenizer, output, ONE_SHARD)
    loaded = read_model(output)
    assert loaded.dtype == dtype
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert [path.name for path in output.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize("shard_bytes", [ONE_SHARD, 2000, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_files_and_index_are_identical_to_those_of_transformers(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, shard_bytes: int, tied: bool
) -> None:
    if not tied:
        model = HyperMoEForCausalLM(HyperMoEConfig(**{**model.config.to_dict(), "tie_word_embeddings": False}))
    export(weights_of(model), tokenizer, tmp_path / "ours", shard_bytes)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(read_model(tmp_path / "ours").config, name))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    theirs = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == theirs | {path.name for path in tokenizer.iterdir()}
    assert (shard_bytes == ONE_SHARD) == ("model.safetensors" in theirs)
    for name in theirs:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_a_folder_has_weights_code_tokenizer_and_token_ids(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "hf"
    export(weights_of(model), tokenizer, output, ONE_SHARD)
    names = {path.name for path in output.iterdir()}
    code = {path.name for path in Path(modeling.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert names >= code | {"config.json", "generation_config.json", "model.safetensors"}
    assert (output / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hypermoe.HyperMoEForCausalLM"


def test_the_output_must_be_an_empty_or_missing_folder(tmp_path: Path) -> None:
    check_output(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name in ("file", "full"):
        with pytest.raises(UserError, match=rf"{name}: exists already; remove it or choose another folder$"):
            check_output(tmp_path / name)


def test_an_existing_output_is_refused_before_writing(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "file").write_text("content")
    with pytest.raises(UserError, match="exists already"):
        export(weights_of(model), tokenizer, tmp_path / "hf", ONE_SHARD)
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "file"]


def test_weights_that_do_not_read_back_are_refused_without_output(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_corrupted(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        name = "model.layers.1.mlp.experts.down_proj"
        save_file(tensors | {name: tensors[name] * 1.001}, file, metadata)

    monkeypatch.setattr(hf, "save_file", save_corrupted)
    with pytest.raises(
        RuntimeError, match=r"model\.layers\.1\.mlp\.experts\.down_proj differs from the tensor that was written"
    ):
        export(weights_of(model), tokenizer, tmp_path / "hf", ONE_SHARD)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_different_logits_is_refused_without_output(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_other_config(config: HyperMoEConfig, folder: Path, **arguments: Any) -> None:
        original(HyperMoEConfig(**{**config.to_dict(), "rope_theta": 5.0}), folder, **arguments)

    original = HyperMoEConfig.save_pretrained
    monkeypatch.setattr(HyperMoEConfig, "save_pretrained", save_other_config)
    with pytest.raises(RuntimeError, match="does not reproduce the logits of the exported model"):
        export(weights_of(model), tokenizer, tmp_path / "hf", ONE_SHARD)
    assert list(tmp_path.iterdir()) == []


def test_a_baked_export_is_compared_with_the_model_before_baking(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        source = weights_of(model.to(dtype))
        export(bake_weights(source), tokenizer, tmp_path / str(dtype), ONE_SHARD, source)
        assert read_model(tmp_path / str(dtype)).config.baked_hyper_experts
    torch.manual_seed(2)
    other = weights_of(HyperMoEForCausalLM(model.config).to(torch.bfloat16))
    with pytest.raises(RuntimeError, match="does not reproduce the logits of the exported model"):
        export(bake_weights(source), tokenizer, tmp_path / "other", ONE_SHARD, other)
    assert not (tmp_path / "other").exists()


def test_a_model_with_nan_logits_is_refused_without_output(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        UserError, match=r"gives logits that are NaN or Inf; inspect it with tools/inspect_checkpoint\.py$"
    ):
        export(weights_of(model), tokenizer, tmp_path / "hf", ONE_SHARD)
    assert sorted(tmp_path.iterdir()) == before


def test_weight_files_have_the_permissions_of_the_other_files(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path
) -> None:
    export(weights_of(model), tokenizer, tmp_path / "hf", ONE_SHARD)
    assert (
        len({path.stat().st_mode for path in (tmp_path / "hf").iterdir() if path.suffix in (".safetensors", ".json")})
        == 1
    )


def test_a_failed_write_is_a_user_error_without_output(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.touch()
        raise OSError("I/O error")

    monkeypatch.setattr(hf, "save_file", fail)
    with pytest.raises(UserError, match=r"hf: cannot be written \(I/O error\)"):
        export(weights_of(model), tokenizer, tmp_path / "hf", ONE_SHARD)
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_read_one_file_at_a_time(model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    peak = 0

    def read(name: str) -> Tensor:
        nonlocal peak
        tensor = model.state_dict()[name].clone()
        alive[:] = [reference for reference in alive if reference() is not None]
        peak = max(peak, sum(reference().nbytes for reference in alive))  # type: ignore[union-attr]
        alive.append(weakref.ref(tensor))
        return tensor

    source = LazyWeights(model.config, model.dtype, {name: partial(read, name) for name in weights_of(model).shapes})
    export(source, tokenizer, tmp_path / "hf", 2000)
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert peak <= largest + 2000 < sum(tensor.nbytes for tensor in model.state_dict().values()) / 2


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("64 kb", 64000), ("1TB", 10**12)]
)
def test_shard_sizes_are_parsed_as_in_transformers(size: str, expected: int) -> None:
    assert shard_bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "5", "GB", "5GiB", "-5GB", "0MB", "1.5GB", "9" * 13 + "GB"])
def test_invalid_shard_sizes_are_refused(size: str) -> None:
    with pytest.raises(UserError, match=rf"--max-shard-size={size}: is not a size; give a number and a unit"):
        shard_bytes_of(size)


def test_an_export_needs_free_disk_space_for_its_weights(
    model: HyperMoEForCausalLM, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"hf: needs 0.00 GiB, but 0.00 GiB are free; free disk space"):
        export(weights_of(model), tokenizer, tmp_path / "hf", ONE_SHARD)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is neither a run folder nor a Hugging Face folder; give one of them$"):
        load_any(tmp_path)
    with pytest.raises(UserError, match=r"config.json: is missing; give a Hugging Face folder$"):
        read_model(tmp_path)
