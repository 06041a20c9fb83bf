"""Test Transformers' Trainer: gradient accumulation, evaluation, metrics and the best checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_references import VARIANTS, build, distance, tokens
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM

LENGTHS = (9, 3, 6, 2)
LENGTH = max(LENGTHS)


def padded_texts() -> list[dict[str, Tensor]]:
    """Return random texts of different lengths, padded on the right."""
    data = []
    for length in LENGTHS:
        ids, mask = tokens(LENGTH), (torch.arange(LENGTH) < length).long()
        data.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return data


def make_trainer(model: HyperMoEForCausalLM, folder: Path, data: list[dict[str, Tensor]], **arguments: Any) -> Trainer:
    metrics = arguments.pop("compute_metrics", None)
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    settings = TrainingArguments(str(folder), **fixed, **arguments)
    return Trainer(model, settings, train_dataset=data, eval_dataset=data, compute_metrics=metrics)


def weights_after_one_step(folder: Path, micro_batch: int, data: list[dict[str, Tensor]], **settings: Any) -> Tensor:
    """Return all weights after one SGD step over all texts, `micro_batch` texts per pass."""
    model = build(**VARIANTS["top-1"], **settings)
    make_trainer(
        model, folder, data, per_device_train_batch_size=micro_batch, max_steps=1, optim="sgd", learning_rate=0.1,
        gradient_accumulation_steps=len(LENGTHS) // micro_batch, max_grad_norm=0.0,
    ).train()  # fmt: skip
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    coefficients = {"router_aux_loss_coef": 0.0, "z_loss_coef": 0.0}
    data = padded_texts()
    start = torch.cat([p.detach().flatten() for p in build(**VARIANTS["top-1"]).parameters()])
    expected = weights_after_one_step(tmp_path, 4, data, **coefficients) - start
    assert expected.norm() > 1e-2
    for micro_batch in (1, 2):
        step = weights_after_one_step(tmp_path, micro_batch, data, **coefficients) - start
        assert distance(step, expected) < 1e-4


def test_num_items_in_batch_weights_the_losses_by_tokens() -> None:
    model, data = build(router_aux_loss_coef=0.3, z_loss_coef=0.07), padded_texts()
    counts = [length - 1 for length in LENGTHS]
    plain = [model(**{name: value[None] for name, value in row.items()}) for row in data]
    parts = [
        model(**{name: value[None] for name, value in row.items()}, num_items_in_batch=torch.tensor(sum(counts)))
        for row in data
    ]
    for name in ("loss", "lm_loss"):
        expected = sum(getattr(p, name).item() * count for p, count in zip(plain, counts, strict=True)) / sum(counts)
        assert sum(getattr(part, name).item() for part in parts) == pytest.approx(expected, rel=1e-6)
    assert [part.aux_loss.item() for part in parts] == [part.aux_loss.item() for part in plain]
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    together = model(**batch).lm_loss.item()
    assert sum(part.lm_loss.item() for part in parts) == pytest.approx(together, rel=1e-6)
    # For a single batch, num_items_in_batch leaves the loss bitwise identical.
    assert torch.equal(model(**batch, num_items_in_batch=sum(counts)).loss, model(**batch).loss)


@pytest.mark.parametrize("items", [7, 0])
@pytest.mark.parametrize("output_logits", [True, False])
def test_a_micro_batch_without_labels_has_zero_loss_and_gradient(output_logits: bool, items: int) -> None:
    model, ids, labels = build(), tokens(1, 5), torch.full((1, 5), -100)
    output = model(input_ids=ids, labels=labels, num_items_in_batch=items, output_logits=output_logits)
    output.loss.backward()
    assert output.loss.item() == output.lm_loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_evaluation_returns_the_loss_and_passes_logits_and_labels_to_compute_metrics(tmp_path: Path) -> None:
    model, data, seen = build(), padded_texts(), []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    result = make_trainer(model, tmp_path, data, per_device_eval_batch_size=4, compute_metrics=metrics).evaluate()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        expected = model(**batch)
    assert result["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
    assert 0 <= result["eval_accuracy"] <= 1
    assert np.allclose(seen[0].predictions, expected.logits.numpy(), atol=1e-5)
    assert np.array_equal(seen[0].label_ids, batch["labels"].numpy())


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model, data = build(), padded_texts()
    run = make_trainer(
        model, tmp_path, data, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=3,
        eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, learning_rate=0.3,
        load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert len(losses) == 3
    assert best < 3, "the test needs a best step before the last"
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = HyperMoEForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in saved.named_parameters())
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_only_logits_are_predictions() -> None:
    model, ids = build(), tokens(2, 5)
    ignored = HyperMoEConfig.keys_to_ignore_at_inference
    assert isinstance(ignored, list)  # the Trainer appends to this list
    returned = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert set(returned) - set(ignored) == {"loss", "logits"}
