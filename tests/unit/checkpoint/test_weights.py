"""Models read from a checkpoint are bitwise identical for any sharding; damaged or wrong checkpoints are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hypermoe_ds.checkpoint import weights
from hypermoe_ds.checkpoint.expert_layout import training_weights
from hypermoe_ds.checkpoint.manifest import Manifest, SliceEntry, TensorEntry
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import shard_name, write_shard, write_weights
from hypermoe_ds.checkpoint.weights import load_model, open_weights
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM

N, F, D = 3, 4, 8
BLOCK = "model.layers.1.mlp.experts"


def small(**overrides: Any) -> HyperMoEConfig:
    sizes: dict[str, Any] = dict.fromkeys(
        ("expert_embedding_size", "selection_hidden_size", "hypernetwork_input_size", "bottleneck_size"), 2
    )
    return HyperMoEConfig(**{
        "vocab_size": 16, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "moe_intermediate_size": F, "num_experts": N, "adapter_size": 2, "first_dense_layers": 1,
        "shared_expert_size": 4, **sizes, **overrides,
    })  # fmt: skip


def as_trained(model: HyperMoEForCausalLM) -> dict[str, Tensor]:
    """Return the parameters by their names in the training model, and stack the experts one by one."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gate_up, down = tensors.pop(f"{BLOCK}.gate_up_proj"), tensors.pop(f"{BLOCK}.down_proj")
    tensors[f"{BLOCK}.w1"] = torch.stack([gate_up[expert, :F] for expert in range(N)])
    tensors[f"{BLOCK}.w3"] = torch.stack([gate_up[expert, F:] for expert in range(N)])
    tensors[f"{BLOCK}.w2"] = torch.stack([down[expert] for expert in range(N)])
    return tensors


def run_of(folder: Path, config: HyperMoEConfig) -> tuple[RunFolder, Path]:
    """Create a run folder with an empty checkpoint of step 0."""
    run = RunFolder(folder / "run")
    config.save_pretrained(run.model)
    checkpoint = run.checkpoints / "step_00000000"
    checkpoint.mkdir(parents=True)
    (run.checkpoints / "latest").write_text(checkpoint.name)
    return run, checkpoint


def saved_run(folder: Path, precision: str = "fp32", **overrides: Any) -> tuple[RunFolder, HyperMoEForCausalLM]:
    run, checkpoint = run_of(folder, small(**overrides))
    torch.manual_seed(3)
    model = HyperMoEForCausalLM(small(**overrides))
    write_weights(checkpoint, as_trained(model).items(), {"train": {"precision": precision}}, {}, shard_bytes=2000)
    return run, model


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loaded_model_has_the_saved_weights_in_the_precision_of_the_run(
    tmp_path: Path, precision: str, tied: bool
) -> None:
    run, model = saved_run(tmp_path, precision, tie_word_embeddings=tied)
    loaded = load_model(run)
    assert not loaded.training
    assert_same(loaded.state_dict(), model.to(weights.PRECISIONS[precision]).state_dict())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_weights_have_the_names_of_a_model_file_and_any_precision(tmp_path: Path) -> None:
    run, model = saved_run(tmp_path, "fp32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    with open_weights(run, dtype=torch.bfloat16) as view:
        assert set(view.shapes) == set(model.state_dict()) - {"lm_head.weight"}
        expected = {name: model.state_dict()[name] for name in view.shapes}
        assert_same({name: view.read(name) for name in view.shapes}, expected)
        assert {name: tensor.shape for name, tensor in expected.items()} == view.shapes


def test_closed_files_are_reopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 1)
    run, model = saved_run(tmp_path)
    assert_same(load_model(run).state_dict(), model.state_dict())


def test_parameters_split_over_many_shards_are_joined(tmp_path: Path) -> None:
    run, checkpoint = run_of(tmp_path, small())
    torch.manual_seed(5)
    model, ranks = HyperMoEForCausalLM(small()), 4
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    entries = {}
    for name, tensor in as_trained(model).items():
        ends = [*sorted(torch.randint(0, tensor.numel() + 1, (ranks - 1,)).tolist()), tensor.numel()]
        pieces, start = [], 0
        for rank, end in zip(torch.randperm(ranks).tolist(), ends, strict=True):
            if end > start:
                shards[rank][f"weight/{name}"] = tensor.flatten()[start:end].clone()
                pieces.append(SliceEntry(rank, start, end - start))
            start = end
        entries[name] = TensorEntry(tuple(tensor.shape), tuple(pieces))
    files = {shard_name(rank): write_shard(checkpoint, rank, shard) for rank, shard in enumerate(shards)}
    Manifest(0, {}, {"train": {"precision": "fp32"}}, entries, ("weight",), files).write(checkpoint)
    assert_same(load_model(run).state_dict(), model.state_dict())


def test_training_tensors_equal_the_tensors_joined_expert_by_expert() -> None:
    torch.manual_seed(1)
    model = HyperMoEForCausalLM(small())
    assert_same(dict(training_weights(model.named_parameters())), as_trained(model))


def test_a_damaged_file_is_refused_before_reading(tmp_path: Path) -> None:
    run, _ = saved_run(tmp_path)
    file = run.checkpoints / "step_00000000" / shard_name(1)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"shard_00001.safetensors: has 100 bytes instead of \d+; choose"):
        load_model(run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"hypernetwork": True, "tie_word_embeddings": False},
            r"lm_head.weight is missing, but \[16, 8\] in the run's",
        ),
        ({"num_experts": 5}, r"model.layers.1.mlp.router.gate.weight is \[3, 8\], but \[5, 8\] in the run's"),
        ({"first_dense_layers": 0}, "model.layers.0.mlp.router.gate.weight is missing"),
    ],
)
def test_a_checkpoint_of_a_different_model_is_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    run, _ = saved_run(tmp_path)
    small(**overrides).save_pretrained(run.model)
    with pytest.raises(
        UserError, match=rf"step_00000000: is not a complete checkpoint of this run \({message}.*; choose"
    ):
        load_model(run)
