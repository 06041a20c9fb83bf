"""Translate the config.json of other models: each key is copied, translated, checked or refused."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hypermoe_ds.checkpoint.hf_folder import CONFIG, last_line, read_config, short
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig

DENSE = ("llama", "mistral", "qwen3")
MOE = ("mixtral", "olmoe", "qwen3_moe")

# Keys that are copied, because Transformers' configurations use the same names.
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
)
_TRANSLATED = (
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
)
# For each key, the values that have no effect. HyperMoE supports no other values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "router_jitter_noise": (0, None),
    "clip_qkv": (None,),
    "mlp_only_layers": ([], None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
}
# Keys that do not affect weights or outputs. The ids of control tokens are taken from the tokenizer.
_WITHOUT_EFFECT = (
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "is_llama_config",
    "model_type",
    "output_router_logits",
    "pad_token_id",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "_model_name_or_path",
    "_name_or_path",
)
# Training settings, which have a different meaning in HyperMoE.
_LEFT_TO_THE_RUN = ("router_aux_loss_coef",)


def model_type(folder: Path) -> str:
    """Return the `model_type` in the config.json of a folder.

    Raises:
        UserError: config.json is missing or has no `model_type`.
    """
    kind = read_config(folder).get("model_type")
    if not isinstance(kind, str):
        raise UserError(
            f"{folder / CONFIG}: model_type={short(kind)}", "is not a model type", "give a Hugging Face folder"
        )
    return kind


def shape_of(folder: Path) -> dict[str, Any]:
    """Translate another model's config.json into fields of `HyperMoEConfig`.

    Returns:
        The fields of HyperMoEConfig; for a dense model, they include no expert settings.

    Raises:
        UserError: a key cannot be translated; the error names the key and its value.
    """
    raw, kind = read_config(folder), model_type(folder)
    if kind == "qwen2":
        raise _refused(folder, "model_type", kind, "has attention biases, which HyperMoE does not support")
    if kind not in (*DENSE, *MOE):
        known = ", ".join(("hypermoe", *DENSE, *MOE))
        raise UserError(f"{folder / CONFIG}: model_type={short(kind)}", "is unknown", f"give one of {known}")
    refuse_unknown(folder, raw, {*_CARRIED, *_TRANSLATED, *_NEUTRAL, *_LEFT_TO_THE_RUN})
    try:
        # Leave out `auto_map`, so that Transformers does not look for code in the folder.
        config = CONFIG_MAPPING[kind](**{key: value for key, value in raw.items() if key not in _WITHOUT_EFFECT})
        _check(folder, config)
        return _fields(kind, config)
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(str(folder / CONFIG), f"is not valid ({last_line(error)})", "correct that key") from None


def _fields(kind: str, config: PreTrainedConfig) -> dict[str, Any]:
    fields = {key: getattr(config, key) for key in _CARRIED}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields["rope_theta"] = float(config.rope_parameters["rope_theta"])
    fields["qk_norm"] = kind in ("qwen3", "qwen3_moe", "olmoe")
    fields["qk_norm_scope"] = "all_heads" if kind == "olmoe" else "head"
    return fields | _experts(kind, config)


def notes_on(folder: Path) -> list[str]:
    """Return notes about keys that are not copied because the recipe sets them."""
    raw = read_config(folder)
    if raw.get("model_type") == HyperMoEConfig.model_type:
        return []
    return [
        f"{key}={short(raw[key])} is not copied, because the recipe sets it" for key in _LEFT_TO_THE_RUN if key in raw
    ]


def _experts(kind: str, config: PreTrainedConfig) -> dict[str, Any]:
    if kind in DENSE:
        return {"intermediate_size": config.intermediate_size}
    own_width = kind == "qwen3_moe"  # Qwen3-MoE has a separate width for its dense layers
    return {
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size if own_width else config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": kind == "mixtral" or config.norm_topk_prob,
        "moe_every": config.decoder_sparse_step if own_width else 1,
    }


def _check(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse values that HyperMoE does not support."""
    for key, neutral in _NEUTRAL.items():
        value = getattr(config, key, neutral[0])
        if value not in neutral:
            raise _refused(folder, key, value, f"HyperMoE supports only {neutral[0]!r}")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise _refused(
            folder, "rope_parameters.rope_type", rope["rope_type"], "HyperMoE does not support scaled rotary embeddings"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused(
            folder, "partial_rotary_factor", rope["partial_rotary_factor"], "HyperMoE rotates all dimensions of a head"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise UserError(
            f"{folder / CONFIG}: sliding_window={window}",
            "HyperMoE attends to the whole sequence",
            f"set max_position_embeddings in that file to at most {window}, a length at which the window has no effect",
        )
    layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layer_types:
        raise _refused(folder, "layer_types", sorted(layer_types), "HyperMoE attends to the whole sequence")
    if config.model_type == "mixtral" and config.num_experts_per_tok == 1:
        raise _refused(
            folder, "num_experts_per_tok", 1, "Mixtral renormalises gates to 1, which HyperMoE never does for K = 1"
        )
    if getattr(config, "norm_topk_prob", False) and config.num_experts_per_tok == 1:
        raise _refused(folder, "norm_topk_prob", True, "HyperMoE never renormalises gates for K = 1")


def refuse_unknown(folder: Path, raw: Mapping[str, Any], known: Set[str]) -> None:
    """Refuse unknown keys, except keys without effect and `PreTrainedConfig` keys with their default values.

    Raises:
        UserError: a key is unknown; the error names the first one.
    """
    general = PreTrainedConfig().to_dict()
    for key, value in raw.items():
        if key not in known and key not in _WITHOUT_EFFECT and not (key in general and general[key] == value):
            raise UserError(
                f"{folder / CONFIG}: {key}={short(value)}",
                "is unknown, and dropping it might change the model",
                "remove it from that file if it does not affect the model",
            )


def _refused(folder: Path, key: str, value: Any, reason: str) -> UserError:
    return UserError(f"{folder / CONFIG}: {key}={short(value)}", reason, "choose a model without it")
