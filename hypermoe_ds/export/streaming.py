"""Run a model layer by layer, reading its tensors on demand."""

import torch
from torch import Tensor, nn

from hypermoe_ds.export.weight_loader import WeightLoader
from hypermoe_ds.modeling import meta_model
from hypermoe_ds.modeling.hyper_experts import HyperExperts


@torch.no_grad()
def streamed_logits(loader: WeightLoader, ids_BS: Tensor) -> Tensor:
    """Return the logits_BSV that the model's own forward pass computes.

    Only one layer, the hypernetwork and the selection encoders are in memory at a time.
    """
    model = meta_model(loader.config).to(loader.dtype)
    names = {id(module): name for name, module in model.named_modules()}

    def load(module: nn.Module, *_: object) -> None:
        tensors = {}
        for name in module.state_dict():
            whole = f"{names[id(module)]}.{name}"
            # A tied output projection has no tensor of its own, so read the embedding.
            tensors[name] = loader.read(whole if whole in loader.shapes else "model.embed_tokens.weight")
        module.load_state_dict(tensors, assign=True)

    def unload(module: nn.Module, *_: object) -> None:
        module.to("meta")

    streamed: list[nn.Module] = [model.model.embed_tokens, model.model.norm, model.lm_head]
    resident = [model.model.hypernetwork] if model.model.hypernetwork is not None else []
    for layer in model.model.layers:
        for part in layer.children():
            # Keep selection encoders in memory, because other modules use them outside their forward pass.
            (resident if isinstance(part, HyperExperts) else streamed).append(part)
    for part in resident:
        load(part)
    for part in streamed:
        part.register_forward_pre_hook(load)
        part.register_forward_hook(unload)
    logits_BSV: Tensor = model(input_ids=ids_BS).logits
    return logits_BSV
