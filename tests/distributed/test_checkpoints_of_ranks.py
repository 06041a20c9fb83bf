"""A checkpoint holds the run: going on from it, and reading the model out of it on one process, change no bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import SAVED_STEP, resume_on_rank, save_on_rank
from small_runs import Layout, probe_of

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


def test_a_resumed_run_goes_on_to_the_bit(saved: Saved) -> None:
    resumed = run_on_ranks(saved.layout.ranks, resume_on_rank, saved.layout, saved.folder)
    for (logits, steps, last_logits), (loaded, steps_again, last_logits_again) in zip(
        saved.ranks, resumed, strict=True
    ):
        assert torch.equal(loaded, logits)
        assert steps_again == steps
        assert torch.equal(last_logits_again, last_logits)


def test_the_model_read_out_of_a_checkpoint_is_the_one_that_trains(saved: Saved) -> None:
    model = load_model(RunFolder(saved.folder), SAVED_STEP)
    assert model.dtype == PRECISIONS[saved.layout.precision]
    assert not model.training
    for rank, (logits, _, _) in enumerate(saved.ranks):
        with torch.no_grad():
            read = model(input_ids=probe_of(rank), use_cache=False).logits.float()
        assert (read - logits).abs().max() <= (1e-5 if saved.layout.precision == "fp32" else 4e-2)


def test_reading_a_model_leaves_the_checkpoints_as_they_are(saved: Saved) -> None:
    before = sorted(saved.folder.rglob("*"))
    load_model(RunFolder(saved.folder))
    assert sorted(saved.folder.rglob("*")) == before
