"""Test that the validation loss is the mean over tokens, for any batches and padding."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hypermoe_ds.training.evaluation import Evaluation, evaluate
from tests.helpers.synchronisations import Synchronisations

V = 11


TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def model(input_ids: Tensor, shift_labels: Tensor, use_cache: bool, output_logits: bool) -> Any:
    """Return the loss of a model whose logits depend only on the current token; NaN if no token has a label."""
    assert not use_cache
    assert not output_logits
    loss = F.cross_entropy(TABLE[input_ids].float().flatten(0, 1), shift_labels.flatten())
    return SimpleNamespace(lm_loss=loss, logits=None)


def batch(seed: int, sequences: int, ignored: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (sequences, 6), generator=generator)
    labels = torch.randint(0, V, (sequences, 6), generator=generator)
    labels.view(-1)[:ignored] = -100
    return {"input_ids": ids, "labels": labels}


def test_loss_is_the_mean_over_labelled_tokens() -> None:
    batches = [batch(1, 2, 0), batch(2, 3, 5), batch(3, 1, 6)]
    losses = []
    for each in batches:
        logits = TABLE[each["input_ids"]].double()
        for row, labels in zip(logits, each["labels"], strict=True):
            for scores, label in zip(row.tolist(), labels.tolist(), strict=True):
                if label != -100:
                    losses.append(math.log(math.fsum(map(math.exp, scores))) - scores[label])
    result = evaluate(model, batches, torch.device("cpu"))
    assert result.tokens == len(losses) == 2 * 6 + 3 * 6 - 5
    assert result.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_batches_without_labels_do_not_count() -> None:
    alone = evaluate(model, [batch(1, 2, 0)], torch.device("cpu"))
    padded = evaluate(model, [batch(2, 2, 12), batch(1, 2, 0), batch(3, 1, 6)], torch.device("cpu"))
    assert padded == alone
    assert math.isfinite(padded.loss)


def test_evaluation_computes_no_gradients() -> None:
    weight = torch.ones(V, requires_grad=True)
    seen = []

    def learning(input_ids: Tensor, **_: Any) -> Any:
        loss = torch.logsumexp(weight - 1, 0)
        seen.append(loss.requires_grad)
        return SimpleNamespace(lm_loss=loss)

    assert evaluate(learning, [batch(1, 1, 0)], torch.device("cpu")).loss == pytest.approx(math.log(V))
    assert seen == [False]


def test_loss_is_exact_over_many_tokens() -> None:
    assert Evaluation(loss=0.0, tokens=1).perplexity == 1.0
    flat = SimpleNamespace(lm_loss=torch.tensor(math.log(V)))
    labels = {"input_ids": torch.zeros(1, 1000, dtype=torch.long), "labels": torch.zeros(1, 1000, dtype=torch.long)}
    result = evaluate(lambda **_: flat, [labels] * 300, torch.device("cpu"))
    assert result.loss == pytest.approx(math.log(V), rel=1e-7)


def test_host_waits_for_the_device_only_once() -> None:
    synchronisations = []
    for count in (1, 5):
        with Synchronisations() as seen:
            evaluate(model, [batch(number, 2, 3) for number in range(count)], torch.device("cpu"))
        synchronisations.append(seen.seen.count("_local_scalar_dense"))
    assert synchronisations[0] == synchronisations[1] <= 2  # the result is one tensor with two numbers


@pytest.mark.parametrize(("loss", "perplexity"), [(0.5, math.exp(0.5)), (1e4, math.inf), (math.nan, math.nan)])
def test_perplexity_of_a_diverged_loss_is_infinite_or_nan(loss: float, perplexity: float) -> None:
    assert Evaluation(loss, 1).perplexity == pytest.approx(perplexity, nan_ok=True)
