"""Write checkpoints and run folders for a given model, without training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.directory import step_name
from hypermoe_ds.checkpoint.manifest import Manifest, SliceEntry, TensorEntry
from hypermoe_ds.checkpoint.shards import write_shard
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM

MOMENTS = ("exp_avg", "exp_avg_sq")
_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "first_dense_layers": 1,
    "moe_intermediate_size": 24,
    "shared_expert_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "qk_norm": True,
    "expert_embedding_size": 8,
    "selection_hidden_size": 8,
    "hypernetwork_input_size": 8,
    "bottleneck_size": 8,
    "adapter_size": 8,
}


def training_weights(model: HyperMoEForCausalLM) -> dict[str, Tensor]:
    """Return the parameters under their names in training, where `gate_up_proj` is split into `w1` and `w3`."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        block, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            half = parameter.shape[1] // 2
            weights[f"{block}.w1"], weights[f"{block}.w3"] = parameter[:, :half], parameter[:, half:]
        else:
            weights[f"{block}.w2" if block.endswith(".experts") else name] = parameter
    return {name: weight.detach() for name, weight in weights.items()}


def write_checkpoint(folder: Path, weights: dict[str, Tensor], moments: bool, step: int = 7) -> dict[str, Tensor]:
    """Write a checkpoint as a run on two ranks would: each tensor with three or more elements is split over two shards.

    Returns:
        The written tensors, keyed by `KIND/NAME`. `exp_avg` is 2 times and `exp_avg_sq` is 3 times the weight.
    """
    kinds = {"weight": 1.0, **dict(zip(MOMENTS, (2.0, 3.0), strict=True))} if moments else {"weight": 1.0}
    entries: dict[str, TensorEntry] = {}
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name, weight in weights.items():
        first = weight.numel() // 3
        ends = (0, first, weight.numel())
        pieces = [SliceEntry(shard, ends[shard], ends[shard + 1] - ends[shard]) for shard in (0, 1)]
        entries[name] = TensorEntry(tuple(weight.shape), tuple(piece for piece in pieces if piece.numel))
        for kind, factor in kinds.items():
            flat = (factor * weight).float().flatten()
            for piece in entries[name].pieces:
                shards[piece.shard][f"{kind}/{name}"] = flat[piece.start : piece.start + piece.numel].clone()
    folder.mkdir(parents=True)
    files = {f"shard_{n:05d}.safetensors": write_shard(folder, n, shard) for n, shard in enumerate(shards)}
    state = {"run": {"step": step, "consumed_samples": 8 * step}}
    Manifest(step, state, {}, entries, tuple(kinds), files).write(folder)
    return {f"{kind}/{name}": factor * weight for kind, factor in kinds.items() for name, weight in weights.items()}


def write_run(folder: Path, model: HyperMoEForCausalLM, steps: dict[int, dict[str, Tensor]]) -> Path:
    """Write a run folder with one checkpoint for each entry of `steps`, and return the folder."""
    model.config.save_pretrained(folder / "resolved" / "model")
    for step, weights in steps.items():
        write_checkpoint(folder / "checkpoints" / step_name(step), weights, moments=True, step=step)
    (folder / "checkpoints" / "latest").write_text(step_name(max(steps)))
    return folder


def small_model(seed: int = 0, **overrides: Any) -> HyperMoEForCausalLM:
    """Build a small HyperMoE model with one dense layer, two MoE layers and a shared expert."""
    torch.manual_seed(seed)
    return HyperMoEForCausalLM(HyperMoEConfig(**{**_SMALL, **overrides})).eval()
