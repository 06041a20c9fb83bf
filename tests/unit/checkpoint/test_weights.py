"""Experts of all ranks are put together, against a construction expert by expert."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.weights import join_experts, load_model
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM

N, F, D = 12, 3, 5
BLOCKS = ("model.layers.0.mlp.experts", "model.layers.10.mlp.experts")


def expert(block: int, index: int, part: str) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * block + 10 * index + int(part[1]))
    return torch.randn((D, F) if part == "w2" else (F, D), generator=generator)


@pytest.mark.parametrize("cut", [False, True])
def test_experts_are_joined_in_order_gate_before_up(cut: bool) -> None:
    weights: dict[str, Tensor] = {"model.norm.weight": torch.ones(D)}
    for number, block in enumerate(BLOCKS):
        for part in ("w1", "w2", "w3"):
            if cut:  # in an order of their own, as files are found
                order = sorted(range(N), key=str, reverse=True)
                weights |= {f"{block}.{part}.{index}": expert(number, index, part) for index in order}
            else:
                weights[f"{block}.{part}"] = torch.stack([expert(number, index, part) for index in range(N)])
    joined = join_experts(weights)
    names = {f"{block}.{name}" for block in BLOCKS for name in ("gate_up_proj", "down_proj")}
    assert joined.keys() == {"model.norm.weight", *names}
    for number, block in enumerate(BLOCKS):
        for index in range(N):
            gate_up = joined[f"{block}.gate_up_proj"][index]
            assert torch.equal(gate_up[:F], expert(number, index, "w1"))
            assert torch.equal(gate_up[F:], expert(number, index, "w3"))
            assert torch.equal(joined[f"{block}.down_proj"][index], expert(number, index, "w2"))


def test_what_is_no_expert_of_the_mixture_is_left_alone() -> None:
    names = ["model.layers.0.mlp.shared_experts.up_proj.weight", "model.layers.0.hyper_experts.encoder.mlp.0.weight"]
    weights = {name: torch.ones(1) for name in names}
    assert join_experts(weights) == weights


def small() -> HyperMoEConfig:
    sizes: dict[str, Any] = dict.fromkeys(
        ("expert_embedding_size", "selection_hidden_size", "hypernetwork_input_size", "bottleneck_size"), 2
    )
    return HyperMoEConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        moe_intermediate_size=4, num_experts=2, adapter_size=2, **sizes,
    )  # fmt: skip


def saved_run(folder: Path) -> RunFolder:
    """A run folder with a checkpoint as ZeRO-1 on one rank leaves it, the experts cut out."""
    run, tokenizer = RunFolder(folder / "run"), folder / "tokenizer"
    tokenizer.mkdir()
    ds_config = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    run.write_settings({}, ds_config, small(), tokenizer)
    checkpoint = run.checkpoints / "step_00000001"
    checkpoint.mkdir(parents=True)
    (run.checkpoints / "latest").write_text(checkpoint.name)
    torch.manual_seed(3)
    weights = HyperMoEForCausalLM(small()).state_dict()
    block = "model.layers.0.mlp.experts"
    gate_up, down = weights.pop(f"{block}.gate_up_proj"), weights.pop(f"{block}.down_proj")
    for index in range(2):
        parts = {"w1": gate_up[index, :4], "w3": gate_up[index, 4:], "w2": down[index]}
        content = {f"{block}.{part}.{index}": tensor.clone() for part, tensor in parts.items()}
        torch.save(content, checkpoint / f"layer_0_expert_{index}_mp_rank_00_model_states.pt")
    torch.save({"module": dict(weights)}, checkpoint / "mp_rank_00_model_states.pt")
    return run


def test_a_model_comes_back_weight_for_weight(tmp_path: Path) -> None:
    run = saved_run(tmp_path)
    torch.manual_seed(3)
    expected = HyperMoEForCausalLM(small()).state_dict()
    loaded = load_model(run).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("damage", ["truncated", "empty", "no module"])
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path, damage: str) -> None:
    run = saved_run(tmp_path)
    file = run.checkpoints / "step_00000001" / "mp_rank_00_model_states.pt"
    if damage == "no module":
        torch.save({}, file)
    else:
        file.write_bytes(file.read_bytes()[: 1000 if damage == "truncated" else 0])
    with pytest.raises(UserError, match=r"step_00000001: is not a whole checkpoint .*; choose another --step$"):
        load_model(run)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    run = saved_run(tmp_path)
    (run.checkpoints / "step_00000001" / "layer_0_expert_0_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_model(run)
    (run.checkpoints / "step_00000001" / "layer_0_expert_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_model(run)
