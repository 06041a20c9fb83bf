"""Run HyperExperts on a separate CUDA stream, overlapped with the all-to-all of the experts."""

import torch
from torch import nn


def overlap_hyper_experts(model: nn.Module, enabled: bool) -> None:
    """Enable or disable the overlap of HyperExperts with the all-to-all in every layer of `model`.

    The overlap does not change the results. All layers share one stream, because each layer waits for its own
    HyperExperts. On CPU, this function has no effect.
    """
    on_gpu = next(model.parameters()).is_cuda
    stream = torch.cuda.Stream() if enabled and on_gpu else None  # type: ignore[no-untyped-call]
    for module in model.modules():
        if hasattr(module, "hyper_stream"):
            module.hyper_stream = stream  # type: ignore[assignment]
