"""The AutoEP section of the DeepSpeed config matches the MoE blocks and no other modules."""

import re

import pytest
from deepspeed.module_inject.auto_ep_config import parse_autoep_config

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.parallel.expert_parallel import autoep_section


@pytest.mark.parametrize("shared", [0, 8])
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_autoep_section_matches_the_moe_blocks_and_their_submodules(shared: int, renormalise: bool) -> None:
    config = HyperMoEConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        moe_intermediate_size=4, num_experts=4, num_experts_per_tok=2, first_dense_layers=1, moe_every=2,
        intermediate_size=8, shared_expert_size=shared, norm_topk_prob=renormalise, bottleneck_size=2,
        expert_embedding_size=2, selection_hidden_size=2, hypernetwork_input_size=2, adapter_size=2,
    )  # fmt: skip
    section = autoep_section(2, config.renormalises_gates, config.shared_expert_size > 0)
    model = HyperMoEForCausalLM(config)
    pattern = re.compile(section["moe_layer_pattern"])
    matched = {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}
    blocks = {name: module for name, module in matched.items() if hasattr(module, section["router_pattern"])}
    assert set(blocks) == {f"model.layers.{index}.mlp" for index in config.moe_layers}
    for block in blocks.values():
        assert block.router.weight.shape[0] == config.num_experts
        experts = getattr(block, section["expert_pattern"])
        assert getattr(experts, section["expert_w1"]).shape == (4, 8, 8)
        assert getattr(experts, section["expert_w2"]).shape == (4, 8, 4)
        assert (getattr(block, section["shared_experts_pattern"]) is not None) == section["has_shared_experts"]
    assert section["route_norm"] is renormalise
    for key, value in (("num_experts_attr", 4), ("top_k_attr", 2)):
        assert getattr(config, section[key]) == value


def test_deepspeed_reads_every_key_of_the_section() -> None:
    section = autoep_section(4, renormalises_gates=True, has_shared_experts=True)
    read = parse_autoep_config(section)
    assert (read.enabled, read.autoep_size) == (True, 4)
    for key, value in section.items():
        assert getattr(read, key) == value, key
