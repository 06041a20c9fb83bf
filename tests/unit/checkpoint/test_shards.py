"""The format: what is written is read in any ranges, and what is damaged is named before it is read."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hypermoe_ds.checkpoint.manifest import MANIFEST, Manifest, Piece, TensorEntry
from hypermoe_ds.checkpoint.shards import CheckpointReader, shard_name, write_shard, write_weights
from hypermoe_ds.errors import UserError

SHAPES = {"embedding": (7, 5), "norm": (5,), "experts": (4, 3, 5)}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut_over(folder: Path, shards: int) -> None:
    """A checkpoint in which each parameter is cut over the shards at places of its own, some shards holding none."""
    contents: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    tensors = {}
    for name, tensor in weights().items():
        cuts = sorted({0, tensor.numel(), *(torch.randint(0, tensor.numel(), (shards - 1,)).tolist())})
        pieces = []
        for shard, (start, stop) in enumerate(pairwise(cuts)):
            contents[shard][f"weight/{name}"] = tensor.flatten()[start:stop].clone()
            contents[shard][f"exp_avg/{name}"] = 2 * tensor.flatten()[start:stop]
            pieces.append(Piece(shard, start, stop - start))
        tensors[name] = TensorEntry(tuple(tensor.shape), tuple(pieces))
    contents[-1]["random_state/cpu"] = torch.arange(9, dtype=torch.uint8)
    files = {shard_name(shard): write_shard(folder, shard, content) for shard, content in enumerate(contents)}
    Manifest(3, {"run": {"lr": 0.1}}, {"a": [1, None]}, tensors, ("weight", "exp_avg"), files).write(folder)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_any_range_is_read_whatever_the_cuts(tmp_path: Path, shards: int) -> None:
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
        found = reader.beside_parameters(shards - 1, "random_state/cpu")
        assert found is not None
        assert torch.equal(found, torch.arange(9, dtype=torch.uint8))
        assert reader.beside_parameters(shards, "random_state/cpu") is None
        assert reader.beside_parameters(0, "random_state/cuda") is None


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1, 3), (4 * 40, 2), (10**6, 1)])
def test_weights_alone_are_written_in_shards_of_at_most_a_size(tmp_path: Path, shard_bytes: int, shards: int) -> None:
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
def test_a_flipped_bit_of_a_shard_is_found_by_its_hash(tmp_path: Path, position: int) -> None:
    cut_over(tmp_path, 2)
    flip(tmp_path / shard_name(1), position)
    CheckpointReader(tmp_path, "sizes")
    with pytest.raises(UserError, match=r"shard_00001.safetensors: is not what was written .*; choose another"):
        CheckpointReader(tmp_path, "full")


@pytest.mark.parametrize("verify", ["sizes", "full"])
def test_a_shard_cut_short_or_gone_is_found(tmp_path: Path, verify: str) -> None:
    cut_over(tmp_path, 2)
    path = tmp_path / shard_name(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard_00000.safetensors: has \d+ bytes and was written with \d+;"):
        CheckpointReader(tmp_path, verify)  # type: ignore[arg-type]
    path.unlink()
    with pytest.raises(UserError, match=r"shard_00000.safetensors: is missing;"):
        CheckpointReader(tmp_path, verify)  # type: ignore[arg-type]


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
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
        if not same:  # a space may become another one
            changed += 1
            with pytest.raises(UserError, match=r"manifest.json: is (missing or damaged|of another format);"):
                CheckpointReader(tmp_path)
        path.write_bytes(whole)
    assert changed > len(whole) // 14
    CheckpointReader(tmp_path)


def test_a_manifest_gone_cut_short_or_no_object_is_refused(tmp_path: Path) -> None:
    cut_over(tmp_path, 1)
    path = tmp_path / MANIFEST
    for content in (path.read_bytes()[:-20], b"", b"[]", b"3"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"manifest.json: is missing or damaged; choose another checkpoint$"):
            Manifest.read(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"manifest.json: is missing or damaged"):
        Manifest.read(tmp_path)
