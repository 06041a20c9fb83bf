"""Tests of `compare`: differences relative to the first folder, by tensor and by group."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hypermoe_ds.inspection.differences import Differences, Distance, compare, elements_to_compare
from hypermoe_ds.inspection.report import difference_lines
from hypermoe_ds.inspection.tensor_readers import open_tensor_reader
from tests.helpers.checkpoints import small_model, training_weights, write_checkpoint

ROUTER, EXPERTS = "model.layers.1.mlp.router.gate.weight", "model.layers.2.mlp.experts.w2"


def compared(folder: Path, first: dict[str, Tensor], second: dict[str, Tensor]) -> Differences:
    for name, weights in (("first", first), ("second", second)):
        write_checkpoint(folder / name, weights, moments=name == "first")
    with open_tensor_reader(folder / "first") as a, open_tensor_reader(folder / "second") as b:
        read: list[int] = []
        differences = compare(a, b, read.append)
        assert sum(read) == elements_to_compare(a, b)
        return differences


def test_a_changed_tensor_is_reported_with_its_group(tmp_path: Path) -> None:
    first = training_weights(small_model())
    second = first | {ROUTER: 1.5 * first[ROUTER], EXPERTS: first[EXPERTS] + 0.01}
    differences = compared(tmp_path, first, second)
    assert differences.tensors.keys() == {"weight"}, "the second has no moments"
    changed = {name: d.relative for name, d in differences.tensors["weight"].items() if d.difference}
    assert changed == {
        ROUTER: pytest.approx(0.5, rel=1e-6),
        EXPERTS: pytest.approx(0.01 * first[EXPERTS].numel() ** 0.5 / first[EXPERTS].norm().item(), rel=1e-4),
    }
    stacks = [first[name].double().flatten() for name in first if ".experts.w" in name]
    groups = differences.groups("weight")
    expected = 0.01 * first[EXPERTS].numel() ** 0.5 / torch.cat(stacks).norm().item()
    assert groups["experts"].relative == pytest.approx(expected, rel=1e-4)
    assert {name for name, distance in groups.items() if distance.relative} == {"experts", "router"}
    assert differences.largest("weight") == sorted(changed, key=lambda name: -changed[name])
    assert [*differences.only_first, *differences.only_second, *differences.reshaped] == []


def test_equal_folders_have_no_difference(tmp_path: Path) -> None:
    weights = training_weights(small_model())
    differences = compared(tmp_path, weights, weights)
    assert differences.largest("weight") == []
    assert "  no difference" in list(difference_lines(differences))


def test_missing_and_reshaped_parameters_are_named(tmp_path: Path) -> None:
    first, second = training_weights(small_model()), training_weights(small_model(num_experts=6, hypernetwork=False))
    differences = compared(tmp_path, first, second)
    assert differences.only_first == sorted(name for name in first if "hyper" in name)
    assert differences.only_second == []
    assert differences.reshaped[EXPERTS] == ((4, 32, 24), (6, 32, 24))
    assert EXPERTS not in differences.tensors["weight"]
    text = list(difference_lines(differences))
    assert f"only in the first folder: {len(differences.only_first)} tensors" in text
    assert f"  {EXPERTS}: [4, 32, 24] and [6, 32, 24]" in text


def test_an_export_differs_from_its_run_only_by_rounding(tmp_path: Path) -> None:
    model = small_model()
    write_checkpoint(tmp_path / "run", training_weights(model), moments=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    with open_tensor_reader(tmp_path / "run") as run, open_tensor_reader(tmp_path / "hf") as folder:
        differences = compare(run, folder)
    assert [*differences.only_first, *differences.only_second, *differences.reshaped] == []
    relative = [distance.relative for distance in differences.tensors["weight"].values()]
    assert 0 < max(relative) < 2**-8


def test_a_difference_from_zero_is_infinite_and_nan_is_listed_first() -> None:
    assert Distance(0.0, 0.0).relative == 0
    assert Distance(1.0, 0.0).relative == math.inf
    tensors = {"a": Distance(1.0, 2.0), "b": Distance(math.nan, 1.0), "c": Distance(1.0, 0.0), "d": Distance(0.0, 1.0)}
    assert Differences([], [], {}, {"weight": tensors}).largest("weight") == ["b", "c", "a"]
