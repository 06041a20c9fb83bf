"""HyperExperts on a CUDA stream of their own, beside the tokens' way to their experts and back."""

import torch
from torch import nn


def overlap_hyper_experts(model: nn.Module, enabled: bool) -> None:
    """Have every layer of `model` run its HyperExperts beside the all-to-all, or in line with it.

    The results are the same. One stream serves all layers, for each waits for its own branch. A model that is
    not on a GPU has nothing to overlap, and nothing changes.
    """
    on_gpu = next(model.parameters()).is_cuda
    stream = torch.cuda.Stream() if enabled and on_gpu else None  # type: ignore[no-untyped-call]
    for module in model.modules():
        if hasattr(module, "hyper_stream"):
            module.hyper_stream = stream  # type: ignore[assignment]
