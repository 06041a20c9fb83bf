"""Readers of a Hugging Face folder open only regular safetensors files inside this folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypermoe_ds.checkpoint.hf_folder import read_hypermoe_config, read_json
from hypermoe_ds.checkpoint.safetensors_folder import SafetensorsFolder
from hypermoe_ds.errors import UserError
from hypermoe_ds.export.from_hf import open_folder
from hypermoe_ds.export.hf import read_model
from hypermoe_ds.files import file_of
from hypermoe_ds.inspection.tensor_readers import open_tensor_reader
from tests.helpers.checkpoints import small_model

READERS: dict[str, Callable[[Path], Any]] = {
    "inspect": open_tensor_reader,
    "generate": read_model,
    "import": open_folder,
}


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return READERS[request.param]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write an export with several weight files, inside a folder with unrelated files."""
    small_model().save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    return tmp_path / "hf"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def rename_in_index(folder: Path, name: object) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    old = first_shard(folder).name
    edit(index, weight_map={key: name if file == old else file for key, file in weight_map.items()})


def test_a_folder_of_several_files_is_read_by_all_readers(folder: Path) -> None:
    expected = small_model().state_dict()
    assert all(torch.equal(read_model(folder).state_dict()[name], tensor) for name, tensor in expected.items())
    assert open_folder(folder).shapes.keys() == expected.keys() - {"lm_head.weight"}


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "sub/a.safetensors", "..", "pytorch_model.bin"])
def test_an_index_that_names_an_outside_file_or_a_pickle_is_refused(
    name: str, folder: Path, read: Callable[[Path], Any]
) -> None:
    outside = folder.parent / "outside.safetensors"
    rename_in_index(folder, str(outside) if name == "ABSOLUTE" else name)
    first_shard(folder).rename(outside)
    with pytest.raises(UserError, match=r"is not a file in this folder|is not a safetensors file"):
        read(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "SHARD"])
def test_a_link_that_leads_out_of_the_folder_is_refused(name: str, folder: Path, read: Callable[[Path], Any]) -> None:
    path = first_shard(folder) if name == "SHARD" else folder / name
    path.rename(folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)
    with pytest.raises(UserError, match=rf"{path.name}: is a link that leads out of the folder"):
        read(folder)


def test_links_inside_the_folder_and_into_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    shard = first_shard(folder)
    shard.rename(folder / "other")
    shard.symlink_to("other")
    read_model(folder)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (snapshot / "other").rename(blobs / "4567")
    (snapshot / shard.name).unlink()
    (snapshot / shard.name).symlink_to("../../blobs/4567")
    read_model(snapshot)
    (blobs / "4567").rename(tmp_path / "4567")
    (blobs / "4567").symlink_to(tmp_path / "4567")
    with pytest.raises(UserError, match="leads out of the folder"):
        read_model(snapshot)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name in ("config.json", "loop.json", "none.json", "a\0.json", "a" * 300):
        with pytest.raises(UserError, match=r"is missing or not a file|cannot be read"):
            file_of(tmp_path, name)


def test_pickled_weights_are_never_read(folder: Path, read: Callable[[Path], Any]) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(small_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: is a pickle, which can run code"):
        read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 200_000, "is nested too deeply"),
        ("[]", "is not a JSON object"),
        ("{}", "names no files"),
        ('{"weight_map": []}', "names no files"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": {"a": 3}}', r"weight_map\['a'\]=3: is not a safetensors file"),
        ('{"weight_map": {"a": "\\u0000.safetensors"}}', "cannot be read|is not a file"),
    ],
)
def test_a_malformed_index_is_refused_in_one_line(
    content: str, message: str, folder: Path, read: Callable[[Path], Any]
) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=rf"model.safetensors.index.json.*{message}|{message}"):
        read(folder)


def test_too_large_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("w") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(UserError, match="is larger than 64 MiB"):
        read_json(tmp_path, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 9_999},
        {"num_hidden_layers": 10**300},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": None},
        {"num_hidden_layers": -1},
        {"vocab_size": 10**18},
        {"hidden_size": 2**40},
        {"hidden_size": float("inf")},
        {"num_attention_heads": 0},
        {"num_key_value_heads": []},
        {"num_experts": 65_536, "num_experts_per_tok": 32_768, "baked_hyper_experts": True},
        {"hyper_conditioning": {}},
        {"hypernetwork": 1},
        {"rope_theta": float("nan")},
        {"rope_theta": "x" * 10**5},
        {"model_type": None},
        {"model_type": ["hypermoe"]},
        {"model_type": "m" * 10**5},
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_a_malformed_or_hostile_configuration_is_refused_in_one_short_line(
    changes: dict[str, Any], folder: Path
) -> None:
    edit(folder / "config.json", **changes)
    for read in (read_model, open_folder):
        with pytest.raises(UserError, match=r"config\.json") as refusal:
            read(folder)
        assert len(str(refusal.value)) < len(str(folder)) + 500


def test_unknown_fields_are_ignored(folder: Path) -> None:
    """Check harmful fields.

    `_attn_implementation` can name code on the Hub, and a huge `num_labels` would create a huge table.
    """
    edit(folder / "config.json", _attn_implementation="org/kernel", num_labels=10**9, dtype="load", auto_map={"a": 1})
    assert read_hypermoe_config(folder).to_dict().get("num_labels", 2) == 2
    assert read_model(folder).config._attn_implementation == "sdpa"


def test_only_control_tokens_are_read_from_the_generation_config(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[2, 7], num_beams=10**9, custom_generate="org/code")
    generation = read_model(folder).generation_config
    assert (generation.eos_token_id, generation.num_beams) == ([2, 7], None)
    for wrong in ("2", [], [2, "a"], 61, -1, True, {"a": 1}):
        edit(folder / "generation_config.json", eos_token_id=wrong)
        with pytest.raises(UserError, match=r"_config.json: eos_token_id=.*: is not an id below vocab_size=61"):
            read_model(folder)
    (folder / "generation_config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="is nested too deeply"):
        read_model(folder)


def test_tensors_of_a_different_model_are_refused(folder: Path) -> None:
    shard = first_shard(folder)
    tensors = load_file(shard)
    save_file({**tensors, "model.more": torch.zeros(1)}, shard)
    with pytest.raises(UserError, match=r"model.more: is not part of a HyperMoE model"):
        read_model(folder)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, shard)
    with pytest.raises(UserError, match=rf"{name}: is missing"):
        read_model(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(UserError, match=rf"{second.name}: .* is also in {first.name}"):
        SafetensorsFolder(folder)
