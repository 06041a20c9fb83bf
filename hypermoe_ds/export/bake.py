"""Replace the hypernetwork with the HyperExperts that it generates for each layer."""

from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from hypermoe_ds.errors import UserError
from hypermoe_ds.export.weight_loader import LazyWeights, WeightLoader, weights_of
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM, meta_model, state_dict_shapes
from hypermoe_ds.modeling.hyper_experts import HyperExperts


def bake(model: HyperMoEForCausalLM) -> HyperMoEForCausalLM:
    """Return an equivalent model that stores N HyperExperts per layer as parameters, without a hypernetwork.

    Args:
        model: a model with one expert per token, or with `hyper_conditioning` "route". This model is not modified. The
            result shares all its weights except those of HyperExperts.

    Raises:
        UserError: the model has no hypernetwork, or more HyperExperts than experts per layer.
    """
    weights = bake_weights(weights_of(model))
    baked = meta_model(weights.config)
    tensors = {name: weights.read(name) for name in weights.shapes}
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    baked.load_state_dict(tensors, assign=True)
    baked.generation_config = model.generation_config
    baked.tie_weights()
    return baked


def bake_weights(loader: WeightLoader) -> LazyWeights:
    """Return the tensors of the baked model. Only the HyperExperts of one layer are in memory at a time.

    Raises:
        UserError: the model has no hypernetwork, or more HyperExperts than experts per layer.
    """
    config = _baked_config(loader.config)
    generators = meta_model(loader.config)

    def load(part: nn.Module, prefix: str) -> None:
        names = part.state_dict()
        part.load_state_dict({name: loader.read(f"{prefix}.{name}") for name in names}, assign=True)

    @lru_cache(maxsize=1)
    def hypernetwork() -> nn.Module:
        part: nn.Module = generators.get_submodule("model.hypernetwork")
        load(part, "model.hypernetwork")
        return part

    @lru_cache(maxsize=1)
    def hyper_experts(layer: int) -> dict[str, Tensor]:
        module = generators.get_submodule(f"model.layers.{layer}.hyper_experts")
        assert isinstance(module, HyperExperts)
        load(module, f"model.layers.{layer}.hyper_experts")
        with torch.no_grad():
            encoded = module.encode_all(loader.config.hyper_set_size, module.encoder.expert_embedding.weight.device)
            layers = torch.full((len(encoded),), module.layer_index, device=encoded.device)
            generated: dict[str, Tensor] = hypernetwork()(encoded, layers)._asdict()
        module.to("meta")
        return generated

    def hyper_expert(layer: int, part: str) -> Tensor:
        return hyper_experts(layer)[part]

    readers = {}
    for name in state_dict_shapes(config):
        block, _, part = name.rpartition(".hyper_experts.")
        layer = block.removeprefix("model.layers.")
        readers[name] = partial(hyper_expert, int(layer), part) if block else partial(loader.read, name)
    return LazyWeights(config, loader.dtype, readers)


def _baked_config(model_config: HyperMoEConfig) -> HyperMoEConfig:
    if not model_config.hypernetwork or not model_config.moe_layers or model_config.baked_hyper_experts:
        raise UserError("--bake", "the model has no hypernetwork", "remove it")
    if model_config.hyper_sets > model_config.num_experts:
        raise UserError(
            "--bake",
            f"{model_config.hyper_sets:,} HyperExperts per layer are more than the {model_config.num_experts} experts",
            "bake a model with num_experts_per_tok=1 or hyper_conditioning=route",
        )
    return HyperMoEConfig(**{**model_config.to_dict(), "baked_hyper_experts": True})
