"""Tests of `inspect` against the same statistics computed in memory."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hypermoe_ds.errors import UserError
from hypermoe_ds.inspection import statistics, tensor_readers
from hypermoe_ds.inspection.report import inspection_lines, write_json
from hypermoe_ds.inspection.statistics import Inspection, by_group, elements_to_inspect, inspect
from hypermoe_ds.inspection.tensor_readers import open_tensor_reader
from tests.helpers.checkpoints import small_model, training_weights, write_checkpoint

FIRST, SECOND = "model.layers.1.mlp", "model.layers.2.mlp"


@pytest.fixture(autouse=True)
def read_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read at most 100 elements at a time, so that even the small tensors of these tests are read in parts."""
    small = tensor_readers.ranges
    monkeypatch.setattr(statistics, "ranges", lambda elements, at_once=2**22: small(elements, min(at_once, 100)))


def inspect_checkpoint(folder: Path, weights: dict[str, Tensor], moments: bool = False) -> Inspection:
    write_checkpoint(folder, weights, moments)
    with open_tensor_reader(folder) as reader:
        return inspect(reader)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"hypernetwork": False}, {"tie_word_embeddings": False, "num_experts_per_tok": 1}, {"shared_expert_size": 0}],
    ids=str,
)
def test_group_sizes_add_up_to_the_parameter_formula(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(**overrides)
    groups = inspect_checkpoint(tmp_path / "cut", training_weights(model)).groups()
    counts, D, N = model.config.parameter_counts(), model.config.hidden_size, model.config.num_experts
    assert sum(measured.elements for measured in groups.values()) == counts.total
    sizes = {name: measured.elements for name, measured in groups.items()}
    assert sizes.get("hypernetwork", 0) + sizes.get("HyperExpert encoders", 0) == counts.hypernetwork
    assert sizes["router"] == 2 * N * D
    assert sizes["experts"] == 2 * N * 3 * D * model.config.moe_intermediate_size
    assert sizes.get("shared experts", 0) == 2 * 3 * D * model.config.shared_expert_size
    assert sizes["dense layers"] == 3 * D * model.config.intermediate_size
    assert sizes["norms"] == 7 * D + 6 * model.config.head_dim
    assert sizes["embeddings"] == model.config.vocab_size * D
    assert sizes.get("head", 0) == (0 if model.config.tie_word_embeddings else model.config.vocab_size * D)
    assert "other" not in sizes
    assert ("hypernetwork" in sizes) == model.config.hypernetwork


def test_an_unknown_parameter_name_belongs_to_the_group_other() -> None:
    names = ["transformer.wte.weight", "model.norm.weight", "model.layers.0.hyper_experts.up_bias"]
    assert by_group(names) == {"baked HyperExperts": names[2:], "norms": names[1:2], "other": names[:1]}


def test_norms_equal_those_of_complete_tensors_for_weights_and_moments(tmp_path: Path) -> None:
    weights = training_weights(small_model())
    inspection = inspect_checkpoint(tmp_path / "cut", weights, moments=True)
    for kind, factor in (("weight", 1), ("exp_avg", 2), ("exp_avg_sq", 3)):
        for group, names in by_group(weights).items():
            whole = torch.cat([weights[name].double().flatten() for name in names])
            assert inspection.groups(kind)[group].norm == pytest.approx(factor * whole.norm().item(), rel=1e-6)
    assert inspection.not_finite() == {}


def test_nan_and_inf_are_counted_by_tensor(tmp_path: Path) -> None:
    weights = training_weights(small_model())
    name = f"{FIRST}.experts.w3"
    broken = weights[name].clone()
    broken.view(-1)[[0, 1, 777, 900]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    clean_norm = broken[broken.isfinite()].double().norm().item()
    inspection = inspect_checkpoint(tmp_path / "cut", weights | {name: broken})
    assert {key: (m.nan, m.inf) for key, m in inspection.not_finite().items()} == {f"weight/{name}": (2, 2)}
    assert inspection.tensors["weight"][name].norm == pytest.approx(clean_norm, rel=1e-9)
    assert f"  weight/{name}: 2 NaN, 2 Inf of {broken.numel():,}" in list(inspection_lines(inspection))
    [first, second] = inspection.similarity
    assert (first.block, second.block) == (FIRST, SECOND)
    assert math.isnan(first.mean)
    assert second.mean == pytest.approx(0, abs=0.05)


def test_expert_similarity_is_the_cosine_of_every_pair(tmp_path: Path) -> None:
    weights = training_weights(small_model(num_experts=5))
    for part in ("w1", "w2", "w3"):  # mix experts so that their cosines range from -1 to 1
        stack = weights[f"{FIRST}.experts.{part}"].clone()
        stack[1] += 0.7 * stack[0]
        stack[4] -= 2.0 * stack[2]
        weights[f"{FIRST}.experts.{part}"] = stack
    for layer in inspect_checkpoint(tmp_path / "cut", weights).similarity:
        flat = [
            torch.cat([weights[f"{layer.block}.experts.{part}"][n].double().flatten() for part in ("w1", "w2", "w3")])
            for n in range(5)
        ]
        cosine = {(a, b): torch.cosine_similarity(flat[a], flat[b], dim=0).item() for a, b in combinations(range(5), 2)}
        assert layer.pair == max(cosine, key=lambda pair: cosine[pair])
        assert layer.largest == pytest.approx(max(cosine.values()), abs=1e-6)
        assert layer.mean == pytest.approx(sum(cosine.values()) / len(cosine), abs=1e-6)


def test_collapsing_experts_and_near_copies_are_reported_in_words(tmp_path: Path) -> None:
    def lines(name: str, layers: dict[str, list[float]]) -> str:
        """Return the report for a model whose experts are mixed with expert 0 in the given shares."""
        weights = training_weights(small_model())
        for block, shares in layers.items():
            for part in ("w1", "w2", "w3"):
                stack = weights[f"{block}.experts.{part}"]
                mixed = [
                    share * stack[0] + (1 - share**2) ** 0.5 * own for share, own in zip(shares, stack, strict=True)
                ]
                weights[f"{block}.experts.{part}"] = torch.stack(mixed)
        return "\n".join(inspection_lines(inspect_checkpoint(tmp_path / name, weights)))

    text = lines("collapsed", {FIRST: [1, 0.9, 0.9, 0.9], SECOND: [1, 0.97, 0, 0]})
    assert f"the experts of {FIRST} are collapsing: their mean cosine is 0.8" in text
    assert f"experts 0 and 1 of {SECOND} are near copies: their cosine is 0.9" in text
    assert "0.5 or more" in text
    assert "the experts differ" not in text
    text = lines("healthy", {FIRST: [1, 0.5, 0.5, 0.5]})
    assert "the experts differ: every mean is below 0.5 and every pair below 0.9" in text


def test_a_single_expert_has_no_similarity(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(
        tmp_path / "cut", training_weights(small_model(num_experts=1, num_experts_per_tok=1))
    )
    assert inspection.similarity == []
    assert "cosine" not in "\n".join(inspection_lines(inspection))


def test_similarity_is_the_same_for_the_expert_layout_of_another_model(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    with open_tensor_reader(tmp_path) as reader:
        ours = inspect(reader).similarity
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    with open_tensor_reader(tmp_path) as reader:
        assert f"{FIRST}.experts.gate_up_proj" in reader.shapes
        theirs = inspect(reader).similarity
    assert [(layer.block, layer.pair) for layer in theirs] == [(layer.block, layer.pair) for layer in ours]
    assert [layer.mean for layer in theirs] == pytest.approx([layer.mean for layer in ours], abs=1e-6)


def test_progress_ends_at_the_announced_number_of_elements(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "cut", training_weights(small_model()), moments=True)
    read: list[int] = []
    with open_tensor_reader(tmp_path / "cut") as reader:
        inspect(reader, read.append)
        assert sum(read) == elements_to_inspect(reader)


def test_more_than_ten_layers_are_listed_in_order(tmp_path: Path) -> None:
    model = small_model(num_hidden_layers=12, first_dense_layers=8)
    blocks = [layer.block for layer in inspect_checkpoint(tmp_path / "cut", training_weights(model)).similarity]
    assert blocks == [f"model.layers.{index}.mlp" for index in (8, 9, 10, 11)]


def test_json_has_every_number_and_null_for_nan(tmp_path: Path) -> None:
    weights = training_weights(small_model())
    weights[f"{FIRST}.experts.w1"] = torch.full_like(weights[f"{FIRST}.experts.w1"], math.nan)
    inspection = inspect_checkpoint(tmp_path / "cut", weights)
    write_json(tmp_path / "seen.json", [inspection], [])
    [folder] = json.loads((tmp_path / "seen.json").read_text())["folders"]
    assert folder["tensors"]["weight"].keys() == weights.keys()
    assert folder["expert_similarity"][0]["mean"] is None
    assert folder["expert_similarity"][1]["warning"] is None
    assert folder["provenance"]["step"] == 7
    assert folder["not_finite"][f"weight/{FIRST}.experts.w1"]["nan"] == weights[f"{FIRST}.experts.w1"].numel()
    with pytest.raises(UserError, match=r"--json=.*none/seen.json: cannot be written"):
        write_json(tmp_path / "none" / "seen.json", [inspection], [])
