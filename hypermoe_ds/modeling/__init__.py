"""The model: configuration, decoder, Mixture of Experts and HyperExperts. Knows nothing of ranks."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_hypermoe import PRESETS, HyperMoEConfig
from .modeling_hypermoe import HyperMoEForCausalLM

AutoConfig.register(HyperMoEConfig.model_type, HyperMoEConfig)
AutoModelForCausalLM.register(HyperMoEConfig, HyperMoEForCausalLM)

__all__ = ["PRESETS", "HyperMoEConfig", "HyperMoEForCausalLM"]
