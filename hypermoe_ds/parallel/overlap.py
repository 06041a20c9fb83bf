"""HyperExperts on a CUDA stream of their own, beside the tokens' way to their experts and back."""

import torch
from torch import nn


def overlap_hyper_experts(model: nn.Module, enabled: bool) -> None:
    """Have every layer of `model` run its HyperExperts beside the all-to-all, or in line with it.

    The results are the same. One stream serves all layers, for each waits for its own branch. Without a GPU
    there is nothing to overlap and nothing changes.
    """
    stream = torch.cuda.Stream() if enabled and torch.cuda.is_available() else None
    for module in model.modules():
        if hasattr(module, "hyper_stream"):
            module.hyper_stream = stream  # type: ignore[assignment]
