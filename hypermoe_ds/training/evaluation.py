"""Validation loss and perplexity."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hypermoe_ds.config import Settings


class EvaluationConfig(Settings):
    """When the model is validated, and on how much."""

    interval: int = Field(1000, ge=1, description="steps between two validations; one more comes at the end")
    max_samples: int | None = Field(
        None, ge=1, description="validate on the first so many sequences; null takes all of them"
    )


@dataclass(frozen=True)
class Evaluation:
    """Result of a validation.

    Attributes:
        loss: mean cross-entropy in nats per token.
        tokens: tokens it is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(model: Callable[..., Any], batches: Iterable[dict[str, Tensor]], device: torch.device) -> Evaluation:
    """Mean loss over all tokens of `batches`, over all ranks (collective).

    Args:
        model: the model or engine, in evaluation mode.
        batches: `input_ids` and `labels` [B, S], labels being the next tokens or -100.
        device: where the model is.
    """
    # In fp64 on the host: MPS-free, and the sum of millions of tokens keeps its digits.
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"].to(device)).logits
        labels = batch["labels"].to(device)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        total += torch.tensor([loss.item(), (labels != -100).sum().item()], dtype=torch.float64)
    if torch.distributed.is_initialized():
        total = total.to(device)
        torch.distributed.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return Evaluation(loss=loss_sum / tokens, tokens=int(tokens))
