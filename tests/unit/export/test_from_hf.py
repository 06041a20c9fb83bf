"""Models imported from Hugging Face folders compute the same outputs as the Transformers classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hypermoe_ds.errors import UserError
from hypermoe_ds.export.from_hf import open_folder
from hypermoe_ds.export.streaming import streamed_logits
from hypermoe_ds.export.weight_loader import weights_of
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from tests.unit.export.folders import EXPERTS, SMALL_HYPER, ids, largest_difference, saved, their_logits, their_model

ROUTED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "mixtral tied": {"num_local_experts": 6, "num_experts_per_tok": 3, "tie_word_embeddings": True, "head_dim": 16},
    "olmoe": EXPERTS,
    "olmoe normalised": EXPERTS | {"norm_topk_prob": True, "num_key_value_heads": 4},
    "olmoe top-1": EXPERTS | {"num_experts_per_tok": 1},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True, "moe_intermediate_size": 16, "head_dim": 16},
    "qwen3_moe sparse": EXPERTS | {"moe_intermediate_size": 16, "decoder_sparse_step": 2, "num_hidden_layers": 5},
}


@pytest.mark.parametrize("in_memory_form", [False, True])
@pytest.mark.parametrize("case", ROUTED)
def test_an_imported_moe_gives_the_logits_of_transformers(case: str, in_memory_form: bool, tmp_path: Path) -> None:
    theirs = their_model(
        case.partition(" ")[0], **ROUTED[case], rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    )
    saved(theirs, tmp_path, save_original_format=not in_memory_form, max_shard_size="20KB")
    weights = open_folder(tmp_path, fields=SMALL_HYPER)
    assert weights.config.hypernetwork
    assert weights.config.rope_theta == 5e4
    assert largest_difference(weights, theirs) < 1e-4 < 0.01 * float(their_logits(theirs).abs().max())


def test_experts_and_routers_are_imported_in_order(tmp_path: Path) -> None:
    theirs = their_model("mixtral", **ROUTED["mixtral"])
    weights = open_folder(saved(theirs, tmp_path))
    of_layer = dict(theirs.model.layers[1].mlp.named_parameters())
    names = {"experts.gate_up_proj": "experts.gate_up_proj", "experts.down_proj": "experts.down_proj"}
    for ours, name in (names | {"router.gate.weight": "gate.weight"}).items():
        assert torch.equal(weights.read(f"model.layers.1.mlp.{ours}"), of_layer[name])


def test_imported_models_get_hyper_experts_that_start_at_zero_and_have_gradients(tmp_path: Path) -> None:
    theirs = their_model("mixtral", **ROUTED["mixtral"])
    weights = open_folder(saved(theirs, tmp_path), fields=SMALL_HYPER, seed=1)
    model = HyperMoEForCausalLM(weights.config)
    model.load_state_dict({name: weights.read(name) for name in weights.shapes}, strict=False)
    output = model.train()(input_ids=ids(), labels=ids(), output_router_logits=True)
    assert [float(norms[1]) for norms in output.hyper_expert_norms] == [0.0, 0.0]
    output.loss.backward()
    assert float(model.model.hypernetwork.up_weight.weight.grad.norm()) > 0
    embedding = model.model.layers[0].hyper_experts.encoder.expert_embedding.weight
    assert 0.5 < float(embedding.detach().std()) < 1.5
    other = open_folder(tmp_path, fields=SMALL_HYPER, seed=2)
    name = "model.hypernetwork.trunk.weight"
    assert torch.equal(open_folder(tmp_path, fields=SMALL_HYPER, seed=1).read(name), weights.read(name))
    assert not torch.equal(other.read(name), weights.read(name))


def test_a_model_can_be_imported_without_hyper_experts(tmp_path: Path) -> None:
    theirs = their_model("olmoe", **EXPERTS)
    weights = open_folder(saved(theirs, tmp_path), fields={"hypernetwork": False})
    assert not any("hyper" in name for name in weights.shapes)
    assert largest_difference(weights, theirs) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hypermoe_folder_loads_bit_for_bit_without_token_ids(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = HyperMoEConfig(
        vocab_size=67, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        moe_intermediate_size=8, num_experts=4, first_dense_layers=1, eos_token_id=5, bos_token_id=1, **SMALL_HYPER,
    )  # fmt: skip
    model = HyperMoEForCausalLM(config).to(dtype).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    weights = open_folder(tmp_path)
    assert weights.dtype == dtype
    assert (weights.config.eos_token_id, weights.config.bos_token_id) == (None, None)
    for name, tensor in model.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(weights.read(name), tensor), name
    assert torch.equal(streamed_logits(weights, ids()), streamed_logits(weights_of(model), ids()))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_baked_folder_is_refused(tmp_path: Path) -> None:
    HyperMoEConfig(baked_hyper_experts=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="baked_hyper_experts=True: the model has no hypernetwork to train; give a"):
        open_folder(tmp_path)


def test_an_unknown_config_key_is_refused(tmp_path: Path) -> None:
    HyperMoEConfig().save_pretrained(tmp_path)
    edit(tmp_path, rope_scaling={"rope_type": "linear"})
    with pytest.raises(
        UserError, match=r"config.json: rope_scaling={'rope_type': 'linear'}: is unknown, and dropping it"
    ):
        open_folder(tmp_path)


def test_pickled_and_missing_weights_are_refused(tmp_path: Path) -> None:
    saved(their_model("mixtral", **ROUTED["mixtral"]), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    expected = r"pytorch_model.bin: is a pickle, which can run code when it is read; save the model as safetensors: "
    with pytest.raises(UserError, match=expected):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no weights \(neither model.safetensors nor "):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"model.layers.1.block_sparse_moe.experts.5.w3.weight: is missing; copy"),
        ("unexpected", r"model.layers.0.self_attn.q_proj.bias: is not part of a HyperMoE model; choose"),
        ("shape", r"model.norm.weight: is \[31\], but \[32\] according to config.json; correct"),
        ("dtype", r"model.norm.weight: is stored as F64; save the model as one of F32, BF16, F16"),
    ],
)
def test_wrong_tensors_are_refused_by_name(damage: str, message: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    saved(their_model("mixtral", **ROUTED["mixtral"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del tensors["model.layers.1.block_sparse_moe.experts.5.w3.weight"]
    elif damage == "unexpected":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    else:
        norm = tensors["model.norm.weight"]
        tensors["model.norm.weight"] = norm[:31].clone() if damage == "shape" else norm.double()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_a_missing_or_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    saved(their_model("mixtral", **ROUTED["mixtral"]), tmp_path, max_shard_size="20KB")
    [first, second, *_] = sorted(tmp_path.glob("model-*.safetensors"))
    second.write_bytes(second.read_bytes()[:50])
    with pytest.raises(UserError, match=rf"{second.name}: cannot be read"):
        open_folder(tmp_path)
    first.unlink()
    with pytest.raises(UserError, match=rf"{first.name}: is missing or not a file"):
        open_folder(tmp_path)


def test_a_stored_tied_output_projection_must_equal_the_embedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    theirs = their_model("mixtral", **ROUTED["mixtral"], tie_word_embeddings=True)
    tensors = load_file(saved(theirs, tmp_path) / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert largest_difference(open_folder(tmp_path, fields=SMALL_HYPER), theirs) < 1e-4
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight: differs from the embedding it is tied to"):
        open_folder(tmp_path)


def test_options_that_do_not_fit_the_folder_are_refused(tmp_path: Path) -> None:
    saved(their_model("mixtral", **ROUTED["mixtral"]), tmp_path / "mixtral")
    saved(their_model("llama"), tmp_path / "llama")
    with pytest.raises(UserError, match=r"model_type='llama': is dense; give --upcycle --experts N --top-k K"):
        open_folder(tmp_path / "llama")
    with pytest.raises(
        UserError, match=r"hidden_size=5: is determined by the weights; only these can be set: router_dtype, "
    ):
        open_folder(tmp_path / "mixtral", fields={"hidden_size": 5})
    with pytest.raises(UserError, match=r"adapter_size=0: too small; give at least 1"):
        open_folder(tmp_path / "mixtral", fields={"adapter_size": 0})


def test_weights_with_nan_are_refused_by_name(tmp_path: Path) -> None:
    theirs = their_model("mixtral", **ROUTED["mixtral"])
    with torch.no_grad():
        theirs.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    saved(theirs, tmp_path)
    weights = open_folder(tmp_path, fields=SMALL_HYPER)
    with pytest.raises(UserError, match=r"^model.layers.1.self_attn.q_proj.weight: has NaN or Inf; "):
        list(weights.tensors())
