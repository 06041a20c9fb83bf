"""Any range of a checkpoint can be read, and damage is reported before any range is read."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hypermoe_ds.checkpoint.manifest import MANIFEST, Manifest, SliceEntry, TensorEntry, shard_name
from hypermoe_ds.checkpoint.shards import CheckpointReader, first_not_finite, write_shard, write_weights
from hypermoe_ds.errors import UserError

SHAPES = {"embedding": (7, 5), "norm": (5,), "experts": (4, 3, 5)}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut_over(folder: Path, shards: int) -> None:
    """Write a checkpoint that splits each parameter at random offsets. Some shards contain no part of a parameter."""
    contents: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    tensors = {}
    for name, tensor in weights().items():
        cuts = sorted({0, tensor.numel(), *(torch.randint(0, tensor.numel(), (shards - 1,)).tolist())})
        pieces = []
        for shard, (start, stop) in enumerate(pairwise(cuts)):
            contents[shard][f"weight/{name}"] = tensor.flatten()[start:stop].clone()
            contents[shard][f"exp_avg/{name}"] = 2 * tensor.flatten()[start:stop]
            pieces.append(SliceEntry(shard, start, stop - start))
        tensors[name] = TensorEntry(tuple(tensor.shape), tuple(pieces))
    contents[-1]["random_state/cpu"] = torch.arange(9, dtype=torch.uint8)
    files = {shard_name(shard): write_shard(folder, shard, content) for shard, content in enumerate(contents)}
    Manifest(3, {"run": {"lr": 0.1}}, {"a": [1, None]}, tensors, ("weight", "exp_avg"), files).write(folder)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_any_range_is_read_for_any_sharding(tmp_path: Path, shards: int) -> None:
    torch.manual_seed(shards)
    cut_over(tmp_path, shards)
    with CheckpointReader(tmp_path, "full") as reader:
        assert reader.manifest.step == 3
        assert reader.manifest.state == {"run": {"lr": 0.1}}
        assert reader.manifest.settings == {"a": [1, None]}
        for name, tensor in weights().items():
            assert torch.equal(reader.read(name), tensor)
            flat = tensor.flatten()
            for start in range(len(flat)):
                for stop in range(start, len(flat) + 1):
                    assert torch.equal(reader.read_range(name, start, stop), flat[start:stop])
                    assert torch.equal(reader.read_range(name, start, stop, "exp_avg"), 2 * flat[start:stop])
        found = reader.extra_tensor(shards - 1, "random_state/cpu")
        assert found is not None
        assert torch.equal(found, torch.arange(9, dtype=torch.uint8))
        assert reader.extra_tensor(shards, "random_state/cpu") is None
        assert reader.extra_tensor(0, "random_state/cuda") is None


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1, 3), (4 * 40, 2), (10**6, 1)])
def test_weights_are_written_in_shards_of_a_maximum_size(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    in_half = {name: tensor.bfloat16() for name, tensor in weights().items()}
    write_weights(tmp_path, in_half.items(), {}, {}, shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    with CheckpointReader(tmp_path, "full") as reader:
        assert reader.manifest.kinds == ("weight",)
        for name, tensor in in_half.items():
            assert torch.equal(reader.read(name), tensor.float())


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 9, -1, -9])
def test_a_flipped_bit_in_a_shard_is_found_by_its_hash_if_hashes_are_verified(tmp_path: Path, position: int) -> None:
    cut_over(tmp_path, 2)
    flip(tmp_path / shard_name(1), position)
    with pytest.raises(
        UserError, match=r"shard_00001.safetensors: has changed since it was written .*; choose another"
    ):
        CheckpointReader(tmp_path)
    if position < 0:  # a negative position is an offset within the tensor data
        CheckpointReader(tmp_path, "sizes")


@pytest.mark.parametrize("damage", [b"\0" * 64, b"\xff" * 8, b"\x10" + b"\0" * 7])
def test_a_damaged_header_is_found_without_hashes(tmp_path: Path, damage: bytes) -> None:
    cut_over(tmp_path, 2)
    path = tmp_path / shard_name(1)
    path.write_bytes(damage + path.read_bytes()[len(damage) :])
    with pytest.raises(UserError, match=r"shard_00001.safetensors: has a damaged header \(.*; choose another"):
        CheckpointReader(tmp_path, "sizes")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight/other", torch.zeros(5)),
        ("weight/norm", torch.zeros(4)),
        ("weight/norm", torch.zeros(5, 1)),
        ("weight/norm", torch.zeros(5, dtype=torch.bfloat16)),
    ],
)
def test_a_shard_that_contradicts_the_manifest_is_refused(tmp_path: Path, name: str, tensor: Tensor) -> None:
    write_weights(tmp_path, {"norm": torch.ones(5)}.items(), {}, {}, 10**6)
    manifest = Manifest.read(tmp_path)
    files = {shard_name(0): write_shard(tmp_path, 0, {name: tensor, "padding": torch.zeros(9)})}
    replace(manifest, files=files).write(tmp_path)
    with pytest.raises(UserError, match=r"shard_00000.safetensors: does not have weight/norm as \[5\] in fp32; choose"):
        CheckpointReader(tmp_path)


def test_a_range_outside_a_parameter_is_refused(tmp_path: Path) -> None:
    cut_over(tmp_path, 2)
    with CheckpointReader(tmp_path) as reader:
        for start, stop in ((0, 36), (-1, 3), (36, 37), (4, 3)):
            with pytest.raises(ValueError, match="has no range"):
                reader.read_range("embedding", start, stop)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"a": torch.ones(3), "b": torch.tensor([1.0, float("nan"), 2.0])}, "b"),
        ({"a": torch.tensor([float("-inf")]), "b": torch.ones(1)}, "a"),
        ({"a": torch.tensor([3e38, 3e38, -3e38]), "none": torch.empty(0), "state": torch.zeros(2).byte()}, None),
    ],
)
def test_a_tensor_with_nan_or_inf_is_named(tensors: dict[str, Tensor], found: str | None) -> None:
    assert first_not_finite(tensors.items()) == found


@pytest.mark.parametrize("verify", ["sizes", "full"])
def test_a_truncated_or_missing_shard_is_found(tmp_path: Path, verify: str) -> None:
    cut_over(tmp_path, 2)
    path = tmp_path / shard_name(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard_00000.safetensors: has \d+ bytes instead of \d+;"):
        CheckpointReader(tmp_path, verify)  # type: ignore[arg-type]
    path.unlink()
    with pytest.raises(UserError, match=r"shard_00000.safetensors: is missing;"):
        CheckpointReader(tmp_path, verify)  # type: ignore[arg-type]


def test_any_flipped_bit_in_the_manifest_is_found(tmp_path: Path) -> None:
    cut_over(tmp_path, 2)
    path = tmp_path / MANIFEST
    whole = path.read_bytes()
    changed = 0
    for position in range(0, len(whole), 7):
        flip(path, position)
        try:
            same = json.loads(path.read_bytes()) == json.loads(whole)
        except ValueError:
            same = False
        if not same:  # a flipped bit may turn a space into other whitespace
            changed += 1
            with pytest.raises(UserError, match=r"manifest.json: is (missing or damaged|of another format);"):
                CheckpointReader(tmp_path)
        path.write_bytes(whole)
    assert changed > len(whole) // 14
    CheckpointReader(tmp_path)


def test_a_missing_truncated_or_invalid_manifest_is_refused(tmp_path: Path) -> None:
    cut_over(tmp_path, 1)
    path = tmp_path / MANIFEST
    for content in (path.read_bytes()[:-20], b"", b"[]", b"3"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"manifest.json: is missing or damaged; choose another checkpoint$"):
            Manifest.read(tmp_path)
    for brackets in ("[]", ('{"a":', "}")):
        path.write_text(200_000 * brackets[0] + "1" + 200_000 * brackets[1])
        with pytest.raises(UserError, match=r"manifest.json: is missing or damaged"):
            Manifest.read(tmp_path)
    with path.open("wb") as file:
        file.truncate(2**43)  # a sparse file uses no disk space
    with pytest.raises(UserError, match=r"manifest.json: is missing or damaged"):
        Manifest.read(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"manifest.json: is missing or damaged"):
        Manifest.read(tmp_path)


def forge(folder: Path, *keys: Any, to: Any) -> None:
    """Change or delete a value in the manifest, and update the manifest's digest."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["digest"]
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if to is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**content, "digest": digest}))


FILE = {"bytes": 10**18, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (["tensors", "norm", "shape"], [2**62, 2**62], "the ranges of 'norm' do not cover its shape"),
        (["tensors", "norm", "shape"], [5, -1], "tensors.norm.shape.1: Input should be greater than or equal to 0"),
        (["tensors", "norm", "shape"], "5", "tensors.norm.shape: Input should be a valid tuple"),
        (["tensors", "norm", "shape"], [5.0], "tensors.norm.shape.0: Input should be a valid integer"),
        (["tensors", "norm", "shape"], [True, 5], "tensors.norm.shape.0: Input should be a valid integer"),
        (["tensors", "norm", "pieces"], [], "the ranges of 'norm' do not cover its shape"),
        (["tensors", "norm", "pieces"], [[0, 0, 4]], "the ranges of 'norm' do not cover its shape"),
        (["tensors", "norm", "pieces"], [[0, 0, 9], [1, 9, 1]], "the ranges of 'norm' do not cover its shape"),
        (["tensors", "norm", "pieces"], [[0, 1, 5]], "the ranges of 'norm' do not cover its shape"),
        (["tensors", "norm", "pieces"], [[0, 0, 3], [0, 3, 2]], "the ranges of 'norm' do not cover its shape"),
        (
            ["tensors", "norm", "pieces"],
            [[9, 0, 5]],
            "shard_00009.safetensors is smaller than the 40 bytes of its ranges",
        ),
        (["tensors", "norm", "pieces"], [[-1, 0, 5]], "tensors.norm.pieces.0.0: Input should be greater"),
        (["tensors", "norm"], {"shape": [2**40], "pieces": [[0, 0, 2**40]]}, "shard_00000.safetensors is smaller than"),
        (["tensors"], [], "tensors: Input should be a valid dict"),
        (["tensors"], None, "it has unknown or missing keys"),
        (["unknown"], 1, "it has unknown or missing keys"),
        (["step"], -1, "step: Input should be greater than or equal to 0"),
        (["step"], 10**400, "step: Input should be less than 9223372036854775808"),
        (["step"], "3", "step: Input should be a valid integer"),
        (["state", "run"], 3, "a part of its state is not an object"),
        (["kinds"], ["weight", "weight"], "kinds "),
        (["kinds"], ["exp_avg"], "kinds "),
        (
            ["files", "../shard_00000.safetensors"],
            FILE,
            r"files.../shard_00000.safetensors.\[key\]: String should match",
        ),
        (["files", "/etc/passwd"], FILE, r"files./etc/passwd.\[key\]: String should match"),
        (["files", "shard_00000.safetensors", "bytes"], 3, "shard_00000.safetensors is smaller than"),
        (["files", "shard_00000.safetensors", "sha256"], "?", "sha256: String should match"),
    ],
)
def test_an_inconsistent_manifest_is_refused_before_memory_is_allocated(
    tmp_path: Path, keys: list[str], to: Any, message: str
) -> None:
    cut_over(tmp_path, 2)
    forge(tmp_path, *keys, to=to)
    with pytest.raises(UserError, match=rf"manifest.json: is not valid \(.*{message}.*; choose another"):
        CheckpointReader(tmp_path)


def test_a_link_out_of_the_folder_is_refused_and_a_link_inside_is_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "checkpoint", tmp_path / "outside"
    for made in (folder, outside):
        made.mkdir()
    cut_over(folder, 1)
    for name, reason in ((shard_name(0), "is a link that leads out of its folder; replace"), (MANIFEST, "is a link")):
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)
        with pytest.raises(UserError, match=rf"{name}: {reason}"):
            CheckpointReader(folder)
        (folder / name).unlink()
        (outside / name).rename(folder / "kept")
        (folder / name).symlink_to("kept")
        CheckpointReader(folder).release()
        (folder / "kept").rename(folder / name)
    (tmp_path / "link").symlink_to(folder)  # a checkpoint moved to other storage
    CheckpointReader(tmp_path / "link").release()
