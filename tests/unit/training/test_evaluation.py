"""Validation: the mean over tokens, whatever the batches and their padding."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hypermoe_ds.training.evaluation import Evaluation, evaluate

V = 11


def model(input_ids: Tensor) -> Any:
    """Logits that depend on the token alone."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(logits=table[input_ids].to(torch.bfloat16))


def batch(seed: int, sequences: int, ignored: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (sequences, 6), generator=generator)
    labels = torch.randint(0, V, (sequences, 6), generator=generator)
    labels.view(-1)[:ignored] = -100
    return {"input_ids": ids, "labels": labels}


def test_the_loss_is_the_mean_over_all_labelled_tokens() -> None:
    batches = [batch(1, 2, 0), batch(2, 3, 5), batch(3, 1, 6)]
    losses = []
    for one in batches:
        logits = model(one["input_ids"]).logits.double()
        for row, labels in zip(logits, one["labels"], strict=True):
            for scores, label in zip(row.tolist(), labels.tolist(), strict=True):
                if label != -100:
                    losses.append(math.log(math.fsum(map(math.exp, scores))) - scores[label])
    result = evaluate(model, batches, torch.device("cpu"))
    assert result.tokens == len(losses) == 2 * 6 + 3 * 6 - 5
    assert result.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_evaluation_keeps_no_gradients() -> None:
    weight = torch.ones(V, V, requires_grad=True)
    seen = []

    def learning(input_ids: Tensor) -> Any:
        logits = weight[input_ids]
        seen.append(logits.requires_grad)
        return SimpleNamespace(logits=logits)

    assert evaluate(learning, [batch(1, 1, 0)], torch.device("cpu")).loss == pytest.approx(math.log(V))
    assert seen == [False]


def test_many_tokens_keep_the_digits_of_the_sum() -> None:
    assert Evaluation(loss=0.0, tokens=1).perplexity == 1.0
    flat = SimpleNamespace(logits=torch.zeros(1, 1000, V))
    labels = {"input_ids": torch.zeros(1, 1000, dtype=torch.long), "labels": torch.zeros(1, 1000, dtype=torch.long)}
    result = evaluate(lambda input_ids: flat, [labels] * 300, torch.device("cpu"))
    assert result.loss == pytest.approx(math.log(V), rel=1e-7)
