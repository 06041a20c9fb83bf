"""Transformers' Trainer: the loss of accumulated batches, evaluation, metrics and the best checkpoint."""

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


def rows() -> list[dict[str, Tensor]]:
    """Texts of different lengths, padded on the right."""
    data = []
    for length in LENGTHS:
        ids, mask = tokens(LENGTH), (torch.arange(LENGTH) < length).long()
        data.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return data


def trainer(model: HyperMoEForCausalLM, folder: Path, data: list[dict[str, Tensor]], **arguments: Any) -> Trainer:
    metrics = arguments.pop("compute_metrics", None)
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    settings = TrainingArguments(str(folder), **fixed, **arguments)
    return Trainer(model, settings, train_dataset=data, eval_dataset=data, compute_metrics=metrics)


def weights_after_a_step(folder: Path, rows_a_pass: int, data: list[dict[str, Tensor]], **settings: Any) -> Tensor:
    """All weights after one step of SGD over all rows, `rows_a_pass` at once."""
    model = build(**VARIANTS["top-1"], **settings)
    trainer(
        model, folder, data, per_device_train_batch_size=rows_a_pass, max_steps=1, optim="sgd", learning_rate=0.1,
        gradient_accumulation_steps=len(LENGTHS) // rows_a_pass, max_grad_norm=0.0,
    ).train()  # fmt: skip
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_accumulated_batches_of_different_lengths_make_the_step_of_one_large_batch(tmp_path: Path) -> None:
    coefficients = {"router_aux_loss_coef": 0.0, "z_loss_coef": 0.0}
    data = rows()
    start = torch.cat([p.detach().flatten() for p in build(**VARIANTS["top-1"]).parameters()])
    expected = weights_after_a_step(tmp_path, 4, data, **coefficients) - start
    assert expected.norm() > 1e-2
    for rows_a_pass in (1, 2):
        step = weights_after_a_step(tmp_path, rows_a_pass, data, **coefficients) - start
        assert distance(step, expected) < 1e-4


def test_the_losses_of_parts_add_up_to_the_mean_over_all_tokens_and_weigh_routing_losses_by_tokens() -> None:
    model, data = build(router_aux_loss_coef=0.3, z_loss_coef=0.07), rows()
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
    # Alone, a batch is its own mean, bit for bit.
    assert torch.equal(model(**batch, num_items_in_batch=sum(counts)).loss, model(**batch).loss)


@pytest.mark.parametrize("items", [7, 0])
@pytest.mark.parametrize("output_logits", [True, False])
def test_a_part_without_any_label_adds_zero_and_no_gradient(output_logits: bool, items: int) -> None:
    model, ids, labels = build(), tokens(1, 5), torch.full((1, 5), -100)
    output = model(input_ids=ids, labels=labels, num_items_in_batch=items, output_logits=output_logits)
    output.loss.backward()
    assert output.loss.item() == output.lm_loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_evaluation_gives_the_loss_and_hands_logits_and_labels_to_the_metrics(tmp_path: Path) -> None:
    model, data, seen = build(), rows(), []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    found = trainer(model, tmp_path, data, per_device_eval_batch_size=4, compute_metrics=metrics).evaluate()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        expected = model(**batch)
    assert found["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
    assert 0 <= found["eval_accuracy"] <= 1
    assert np.allclose(seen[0].predictions, expected.logits.numpy(), atol=1e-5)
    assert np.array_equal(seen[0].label_ids, batch["labels"].numpy())


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model, data = build(), rows()
    run = trainer(
        model, tmp_path, data, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=3,
        eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, learning_rate=0.3,
        load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert len(losses) == 3
    assert best < 3, "the last step would be loaded anyway"
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = HyperMoEForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in saved.named_parameters())
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_outputs_but_the_logits_are_no_predictions() -> None:
    model, ids = build(), tokens(2, 5)
    ignored = HyperMoEConfig.keys_to_ignore_at_inference
    assert isinstance(ignored, list)  # the Trainer adds ["loss"] to it
    returned = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert set(returned) - set(ignored) == {"loss", "logits"}
