"""Single-device HyperMoE model for Transformers: configuration, decoder, Mixture of Experts and HyperExperts."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_hypermoe import PRESETS, ConfigurationError, HyperMoEConfig
from .modeling_hypermoe import HyperMoEForCausalLM, HyperMoEModel

AutoConfig.register(HyperMoEConfig.model_type, HyperMoEConfig)
AutoModel.register(HyperMoEConfig, HyperMoEModel)
AutoModelForCausalLM.register(HyperMoEConfig, HyperMoEForCausalLM)

__all__ = ["PRESETS", "ConfigurationError", "HyperMoEConfig", "HyperMoEForCausalLM", "meta_model", "state_dict_shapes"]


def meta_model(config: HyperMoEConfig) -> HyperMoEForCausalLM:
    """Build the model without weights, on the meta device and in evaluation mode."""
    with torch.device("meta"):
        model: HyperMoEForCausalLM = HyperMoEForCausalLM(config)
    model.eval()
    return model


def state_dict_shapes(config: HyperMoEConfig) -> dict[str, torch.Size]:
    """Return the name and shape of each tensor in the model's weight files, without a tied output projection."""
    shapes = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes
