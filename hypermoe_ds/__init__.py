"""HyperMoE-DS: pretraining of Mixture-of-Experts language models whose unselected experts help too."""

__version__ = "0.1.0"
