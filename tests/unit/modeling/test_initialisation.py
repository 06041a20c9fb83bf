import math

import pytest
import torch
from model_references import SMALL, random_selection
from torch import Tensor

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM


def assert_uniform(tensor: Tensor, bound: float) -> None:
    """Check for U(-bound, bound): no value outside, some near both ends, standard deviation bound / sqrt(3)."""
    assert tensor.numel() >= 100
    assert tensor.abs().max() <= bound
    assert tensor.max() > 0.9 * bound
    assert tensor.min() < -0.9 * bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def assert_standard_normal(tensor: Tensor) -> None:
    draws = tensor.numel()
    assert draws >= 200
    assert abs(tensor.mean().item()) < 5 / math.sqrt(draws)
    assert tensor.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * draws))
    assert tensor.abs().max() > 2


def assert_published_initialisation(model: HyperMoEForCausalLM) -> None:
    config, hypernetwork = model.config, model.model.hypernetwork
    width, adapter, bottleneck = config.hidden_size, config.adapter_size, config.bottleneck_size
    assert_uniform(hypernetwork.up_weight.weight, 1e-3 * math.sqrt(3 / (bottleneck * adapter)))
    assert_uniform(hypernetwork.down_weight.weight, 1e-3 * math.sqrt(3 / (bottleneck * width)))
    for head in (hypernetwork.up_bias, hypernetwork.down_bias):
        assert_uniform(head.weight, 1e-3 * math.sqrt(3 / bottleneck))
    for head in (hypernetwork.up_weight, hypernetwork.down_weight, hypernetwork.up_bias, hypernetwork.down_bias):
        assert head.bias.count_nonzero() == 0
    assert_standard_normal(hypernetwork.layer_embedding.weight)
    linears = [hypernetwork.trunk]
    for layer in model.model.layers:
        encoder = layer.hyper_experts.encoder
        assert_standard_normal(encoder.expert_embedding.weight)
        linears += [encoder.mlp[0], encoder.mlp[2]]
    for linear in linears:
        assert_uniform(linear.weight, 1 / math.sqrt(linear.in_features))
        assert_uniform(linear.bias, 1 / math.sqrt(linear.in_features))


def published_model(**overrides: object) -> HyperMoEForCausalLM:
    sizes = {
        "num_experts": 16,
        "expert_embedding_size": 128,
        "selection_hidden_size": 120,
        "hypernetwork_input_size": 110,
        "layer_embedding_size": 100,
        "bottleneck_size": 128,
        "adapter_size": 20,
    }
    return HyperMoEForCausalLM(HyperMoEConfig(**{**SMALL, **sizes, **overrides}))


def test_new_and_loaded_models_have_the_published_initialisation(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = published_model()
    assert_published_initialisation(model)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    again = HyperMoEForCausalLM.from_pretrained(folder)
    assert_published_initialisation(again)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_layers_are_initialised_differently() -> None:
    first, second, third = (layer.hyper_experts.encoder for layer in published_model().model.layers)
    for name, parameter in first.named_parameters():
        assert not torch.equal(parameter, second.get_parameter(name))
        assert not torch.equal(parameter, third.get_parameter(name))


def test_hyper_experts_are_initially_close_to_zero() -> None:
    config = HyperMoEConfig(hidden_size=768, num_hidden_layers=1, vocab_size=64, moe_intermediate_size=64)
    model = HyperMoEForCausalLM(config)
    x, selected = torch.randn(64, 768), random_selection(64, 8, 1)
    y = model.model.layers[0].hyper_experts(x, selected, model.model.hypernetwork)
    assert 0 < y.norm() / x.norm() < 5e-3
