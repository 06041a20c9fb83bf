"""HyperMoE-DS: pretrain HyperMoE language models with DeepSpeed."""

__version__ = "0.1.0"
