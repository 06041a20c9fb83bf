"""Every setting in the config.json of another model is translated or refused; none is silently dropped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from hypermoe_ds.errors import UserError
from hypermoe_ds.export.hf_config_mapping import DENSE, MOE, notes_on, shape_of
from hypermoe_ds.modeling import HyperMoEConfig
from tests.unit.export.folders import SIZES, their_model


def config_of(folder: Path, kind: str, **changes: Any) -> Path:
    CONFIG_MAPPING[kind](**SIZES).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_a_plain_config_of_every_model_type_is_translated(kind: str, tmp_path: Path) -> None:
    fields = shape_of(config_of(tmp_path, kind, sliding_window=None))
    for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        assert fields[key] == SIZES[key]
    assert fields["max_position_embeddings"] == 64
    assert fields["qk_norm"] == kind.startswith(("qwen3", "olmoe"))


def test_the_config_of_smollm2_is_translated(tmp_path: Path) -> None:
    content = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "transformers_version": "4.42.3",
        "use_cache": True, "vocab_size": 49152,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    fields = shape_of(tmp_path)
    assert (fields["rope_theta"], fields["head_dim"], fields["tie_word_embeddings"]) == (100000.0, 64, True)
    assert (fields["intermediate_size"], fields["rms_norm_eps"], fields["qk_norm"]) == (1536, 1e-5, False)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True: HyperMoE supports only False; choose"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True: "),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': HyperMoE supports only 'silu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1: "),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True: "),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}: "),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.rope_type='linear': HyperMoE does not support scaled rotary embeddings; choose",
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_parameters.rope_type='dynamic': ",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5: HyperMoE rotates all dimensions of a head",
        ),
        ("llama", {"depth_scale": 3}, "depth_scale=3: is unknown, and dropping it might change the model; remove"),
        ("llama", {"num_hidden_layers": "two"}, "config.json: is not valid"),
        ("mistral", {"sliding_window": 32}, "sliding_window=32: .*; set max_position_embeddings in that file to"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding_window=16: "),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types=|is not valid"),
        ("qwen2", {}, "model_type='qwen2': has attention biases, which HyperMoE does not support; choose"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: "),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1: Mixtral renormalises gates"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: HyperMoE supports only None"),
        ("olmoe", {"norm_topk_prob": True, "num_experts_per_tok": 1}, "norm_topk_prob=True: with K = 1 "),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: "),
        ("gpt2", {}, "model_type='gpt2': is unknown; give one of hypermoe, llama, mistral, qwen3, mixtral, olmoe"),
    ],
)  # fmt: skip
def test_unsupported_settings_are_refused_by_key_and_value(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config_of(tmp_path, kind, **changes)
    with pytest.raises(UserError, match=message) as refusal:
        shape_of(tmp_path)
    assert "\n" not in str(refusal.value)
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"model_type": 3}'])
def test_an_invalid_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    remedy = "(give a Hugging Face folder|export or fetch the folder again)"
    with pytest.raises(UserError, match=rf"config.json.*; {remedy}$"):
        shape_of(tmp_path)


def test_training_settings_that_are_not_translated_are_reported(tmp_path: Path) -> None:
    their_model("olmoe", num_experts=2, num_experts_per_tok=1).to(torch.bfloat16).save_pretrained(tmp_path)
    HyperMoEConfig().save_pretrained(tmp_path / "ours")
    assert notes_on(tmp_path / "ours") == []
    assert notes_on(tmp_path) == ["router_aux_loss_coef=0.01 is not copied, because the recipe sets it"]
