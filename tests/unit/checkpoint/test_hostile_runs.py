"""Run folders with a wrong or impossible model are refused with a one-line error, in bounded time and memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hypermoe_ds.checkpoint.directory import step_name
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import write_weights
from hypermoe_ds.checkpoint.weights import load_model, open_weights
from hypermoe_ds.errors import UserError
from hypermoe_ds.inspection.statistics import expert_blocks, inspect
from hypermoe_ds.inspection.tensor_readers import open_tensor_reader
from hypermoe_ds.training.settings import EvaluationConfig
from tests.helpers.checkpoints import small_model, training_weights


def a_run(folder: Path, settings: dict[str, Any]) -> RunFolder:
    model = small_model()
    run = RunFolder(folder)
    run.write_model(model.config)
    checkpoint = run.checkpoints / step_name(0)
    checkpoint.mkdir(parents=True)
    write_weights(checkpoint, training_weights(model).items(), settings, {}, shard_bytes=10**6)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return a_run(tmp_path / "run", {"train": {"precision": "fp32"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**7}, r"num_hidden_layers=10000000: is more than 10,000"),
        ({"num_hidden_layers": 9000}, r"has weights of 3 layers, but config.json has num_hidden_layers=9000"),
        ({"vocab_size": 10**18}, r"vocab_size=10{18}: is more than"),
        ({"hidden_size": 2**36}, r"hidden_size=68719476736: too large"),
        ({"num_hidden_layers": "3"}, r"num_hidden_layers='3': is not valid"),
        ({"model_type": "llama"}, r"model_type='llama': is not a HyperMoE model"),
        ({"adapter_size": 9}, r"is not a complete checkpoint of this run"),
    ],
    ids=str,
)
def test_a_configuration_of_a_different_model_is_refused(changes: dict[str, Any], message: str, run: RunFolder) -> None:
    path = run.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        load_model(run)


@pytest.mark.parametrize("content", ["", "{", "[" * 200_000, "[]", "\udcff"])
def test_a_damaged_configuration_is_refused(content: str, run: RunFolder) -> None:
    (run.model / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"resolved/model/config\.json: "):
        run.model_config()


@pytest.mark.parametrize("settings", [{}, {"train": None}, {"train": {"precision": []}}, {"train": {"precision": "x"}}])
def test_a_checkpoint_without_a_known_precision_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", settings)
    with pytest.raises(UserError, match=r"train\.precision=.* in its manifest"), open_weights(run):
        pass
    with open_weights(run, dtype=torch.float32) as weights:
        assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a mapping"),
        ("evaluation: [1]", r"config\.yaml: evaluation"),
        ("evaluation: {interval: many}", r"evaluation: interval='many': is not valid"),
        ("{", "is not valid YAML"),
    ],
)
def test_a_damaged_recipe_is_refused(text: str, message: str, run: RunFolder) -> None:
    run.settings.write_text(text)
    with pytest.raises(UserError, match=message):
        run.section("evaluation", EvaluationConfig)


def test_too_many_experts_are_not_compared_with_each_other() -> None:
    assert expert_blocks({"a.experts.w1": (4096, 1, 1), "b.experts.w1": (4097, 1, 1)}) == {"a": ["a.experts.w1"]}


def test_names_with_very_long_numbers_are_inspected(tmp_path: Path) -> None:
    name = f"model.layers.{'9' * 900}.\u00b2.experts.w1"
    write_weights(tmp_path, [(name, torch.ones(2, 1, 1))], {}, {}, shard_bytes=100)
    with open_tensor_reader(tmp_path) as source:
        assert inspect(source).tensors["weight"][name].elements == 2


def test_a_configuration_that_links_out_of_the_run_folder_is_refused(run: RunFolder, tmp_path: Path) -> None:
    path = run.model / "config.json"
    path.rename(tmp_path / "config.json")
    path.symlink_to(tmp_path / "config.json")
    with pytest.raises(UserError, match="leads out of the folder"):
        load_model(run)
