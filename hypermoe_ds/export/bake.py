"""Puts each layer's generated HyperExperts in the place of the hypernetwork."""

import torch

from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.hyper_experts import HyperExperts


@torch.no_grad()
def bake(model: HyperMoEForCausalLM) -> HyperMoEForCausalLM:
    """The same function with N adapters a layer as parameters and no hypernetwork.

    Args:
        model: a model with one expert a token, or conditioned by route; left as it is, its other weights are shared.

    Raises:
        UserError: it has no hypernetwork, or more HyperExperts than experts.
    """
    config = model.config
    if model.model.hypernetwork is None:
        raise UserError("--bake", "the model has no hypernetwork", "leave it out")
    if config.hyper_sets > config.num_experts:
        raise UserError(
            "--bake",
            f"{config.hyper_sets:,} HyperExperts a layer are more than its {config.num_experts} experts",
            "bake a model with num_experts_per_tok=1 or hyper_conditioning=route",
        )
    baked_config = HyperMoEConfig(**{**config.to_dict(), "baked_hyper_experts": True})
    with torch.device("meta"):
        baked = HyperMoEForCausalLM(baked_config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in baked.state_dict()}
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.hyper_experts, HyperExperts):
            encoded = layer.hyper_experts.encode_all(config.hyper_set_size)
            layers = torch.full((len(encoded),), layer.hyper_experts.layer_index, device=encoded.device)
            generated = model.model.hypernetwork(encoded, layers)._asdict()
            weights |= {f"model.layers.{index}.hyper_experts.{name}": part for name, part in generated.items()}
    baked.load_state_dict(weights, assign=True)
    baked.generation_config = model.generation_config
    if config.tie_word_embeddings:
        baked.tie_weights()
    baked.eval()
    return baked
