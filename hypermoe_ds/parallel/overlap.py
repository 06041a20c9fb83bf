"""Run HyperExperts on a separate CUDA stream, overlapped with the all-to-all of the experts."""

import torch
from torch import nn


def overlap_hyper_experts(model: nn.Module, enabled: bool) -> None:
    """Switch the overlap of HyperExperts with the all-to-all on or off in every layer of `model`.

    The results are the same. One stream serves all layers, because each layer waits for its own HyperExperts. On CPU
    nothing changes.
    """
    on_gpu = next(model.parameters()).is_cuda
    stream = torch.cuda.Stream() if enabled and on_gpu else None  # type: ignore[no-untyped-call]
    for module in model.modules():
        if hasattr(module, "hyper_stream"):
            module.hyper_stream = stream  # type: ignore[assignment]
