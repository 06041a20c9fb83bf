"""Initialise HyperExperts for a model that has none, as in pretraining, but with an output of exactly zero."""

import torch
from torch import Tensor

from hypermoe_ds.modeling import HyperMoEConfig, meta_model
from hypermoe_ds.modeling.hyper_experts import HyperNetwork, SelectionEncoder

# If these generator heads are zero, the output relu(x W_down + b_down) W_up + b_up is zero. The gradients of the heads
# are not zero, so training changes them.
_ZERO = ("up_weight", "up_bias")


def init_hyper_experts(model_config: HyperMoEConfig, seed: int) -> dict[str, Tensor]:
    """Return the fp32 tensors of the hypernetwork and of each layer's selection encoder."""
    parts = {
        prefix: part
        for prefix, part in meta_model(model_config).named_modules()
        if isinstance(part, HyperNetwork | SelectionEncoder)
    }
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for prefix, part in parts.items():
            part.to_empty(device="cpu")
            for module in part.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in part.state_dict().items()}
    for name, tensor in tensors.items():
        if name.split(".")[-2] in _ZERO:
            tensor.zero_()
    return tensors
