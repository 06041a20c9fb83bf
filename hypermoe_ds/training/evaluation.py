"""Compute the mean loss and perplexity over batches."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """Result of a validation.

    Attributes:
        loss: mean cross-entropy in nats per token.
        tokens: number of labelled tokens.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite for a loss above 709."""
        return torch.tensor(self.loss, dtype=torch.float64).exp().item()


@contextmanager
def without_hyper_experts(model: nn.Module) -> Iterator[None]:
    """Disable a model's HyperExperts inside the context."""
    modules = [module for module in model.modules() if hasattr(module, "skips_hyper_experts")]
    for module in modules:
        module.skips_hyper_experts = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.skips_hyper_experts = False  # type: ignore[assignment]


@torch.no_grad()
def evaluate(model: Callable[..., Any], batches: Iterable[dict[str, Tensor]], device: torch.device) -> Evaluation:
    """Return the mean loss over all tokens of `batches` on all ranks (collective).

    Args:
        model: the model or engine, in evaluation mode.
        batches: batches with `input_ids`, `labels` and, if documents are masked, `position_ids`, each [B, S]; labels
            are the next tokens or -100.
        device: device of the model.
    """
    # The sums are in fp64, because there may be millions of tokens. They stay on the device, so that the host does not
    # wait for the device in every batch.
    total_2 = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        mean = model(**inputs, shift_labels=labels, use_cache=False, output_logits=False).lm_loss
        count = (labels != -100).sum().double()
        # The mean is NaN if a batch has no labels.
        total_2 += torch.stack([(mean * count).masked_fill(count == 0, 0), count])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total_2)
    loss_sum, tokens = total_2.tolist()
    return Evaluation(loss=loss_sum / tokens, tokens=int(tokens))
