"""The model: configuration, decoder, Mixture of Experts and HyperExperts. Knows nothing of ranks."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_hypermoe import PRESETS, HyperMoEConfig
from .modeling_hypermoe import HyperMoEForCausalLM, HyperMoEModel

AutoConfig.register(HyperMoEConfig.model_type, HyperMoEConfig)
AutoModel.register(HyperMoEConfig, HyperMoEModel)
AutoModelForCausalLM.register(HyperMoEConfig, HyperMoEForCausalLM)

__all__ = ["PRESETS", "HyperMoEConfig", "HyperMoEForCausalLM", "skeleton", "stored_shapes"]


def meta_model(config: HyperMoEConfig) -> HyperMoEForCausalLM:
    """The model without weights, on the meta device and in evaluation mode."""
    with torch.device("meta"):
        model: HyperMoEForCausalLM = HyperMoEForCausalLM(config)
    model.eval()
    return model


def state_dict_shapes(config: HyperMoEConfig) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that a file of the model holds, in order: a tied output projection is none."""
    shapes = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes
