"""Resuming from a checkpoint, or reading its model in one process, restores the state bit for bit."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import SAVED_STEP, resume_into_each, resume_on_rank, save_on_rank
from small_runs import Layout, probe_of

from hypermoe_ds.checkpoint.directory import saved_steps
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.weights import load_model
from tests.helpers.ranks import run_on_ranks

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNTIED = {"tie_word_embeddings": False, "num_experts_per_tok": 1, "moe_every": 2, "num_hidden_layers": 4}
LAYOUTS = {
    "EP 2": Layout(expert=2, accumulation=2),
    "EP 1, ZeRO 2, untied": Layout(stage=2, model=UNTIED),
    "EP 2, ZeRO 3": Layout(expert=2, stage=3),
    "EP 2, bf16": Layout(expert=2, precision="bf16"),
    "EP 2, ZeRO 3, bf16, untied": Layout(expert=2, stage=3, precision="bf16", model=UNTIED),
}


@dataclass
class Saved:
    layout: Layout
    folder: Path
    ranks: list[tuple[Any, ...]]


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    layout, folder = LAYOUTS[request.param], tmp_path_factory.mktemp("run")
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "tokenizer.model").write_bytes(b"any")
    return Saved(layout, folder, run_on_ranks(layout.ranks, save_on_rank, layout, folder, tokenizer))


def test_a_resumed_run_is_bitwise_identical(saved: Saved) -> None:
    resumed = run_on_ranks(saved.layout.ranks, resume_on_rank, saved.layout, saved.folder)
    for (logits, steps, last_logits), (loaded, steps_again, last_logits_again) in zip(
        saved.ranks, resumed, strict=True
    ):
        assert torch.equal(loaded, logits)
        assert steps_again == steps
        assert torch.equal(last_logits_again, last_logits)


def test_the_model_read_from_a_checkpoint_equals_the_training_model(saved: Saved) -> None:
    model = load_model(RunFolder(saved.folder), SAVED_STEP)
    assert model.dtype == PRECISIONS[saved.layout.precision]
    assert not model.training
    for rank, (logits, _, _) in enumerate(saved.ranks):
        with torch.no_grad():
            read = model(input_ids=probe_of(rank), use_cache=False).logits.float()
        assert (read - logits).abs().max() <= (1e-5 if saved.layout.precision == "fp32" else 4e-2)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 8}, "model.num_experts=8"),
    ({"vocab_size": 256}, "model.vocab_size=256"),
    ({"hidden_size": 64}, "model.hidden_size=64"),
    ({"num_hidden_layers": 2}, "model.num_hidden_layers=2"),
    ({"num_hidden_layers": 4}, "model.num_hidden_layers=4"),
    ({"num_key_value_heads": 4}, "model.num_key_value_heads=4"),
    ({"num_experts_per_tok": 1}, "model.num_experts_per_tok=1"),
    ({"tie_word_embeddings": False}, "model.tie_word_embeddings=False"),
]


def test_a_checkpoint_of_a_different_model_is_refused_before_loading(tmp_path: Path) -> None:
    models = [model for model, _ in OTHERS]
    refused = run_on_ranks(1, resume_into_each, Layout(ranks=1), tmp_path, models)[0]
    assert len(refused) == len(OTHERS)
    for (_, message), (error, changed) in zip(OTHERS, refused, strict=True):
        assert re.match(rf"{re.escape(message)}: differs from \S+ in the run folder {re.escape(str(tmp_path))};", error)
        assert not changed
    assert saved_steps(tmp_path / "checkpoints") == [0], "the checkpoint is not renamed"


def test_shapes_are_compared_if_a_checkpoint_does_not_record_its_model(tmp_path: Path) -> None:
    models = [model for model, _ in OTHERS if "num_experts_per_tok" not in model]
    refused = run_on_ranks(1, resume_into_each, Layout(ranks=1), tmp_path, models, False)[0]
    assert len(refused) == len(models)
    for error, changed in refused:
        shape = r"(\[[\d, ]+\]|missing)"
        assert re.match(rf"model: [a-z0-9_.]+: is {shape}, but {shape} in step 0 of \S+; ", error)
        assert not changed
    gate = "model: model.layers.1.mlp.router.gate.weight: is [8, 32], but [4, 32] in step 0 of "
    assert refused[0][0].startswith(gate)


def test_reading_a_model_does_not_change_the_checkpoints(saved: Saved) -> None:
    before = sorted(saved.folder.rglob("*"))
    load_model(RunFolder(saved.folder))
    assert sorted(saved.folder.rglob("*")) == before
