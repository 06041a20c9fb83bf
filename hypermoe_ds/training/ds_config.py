"""Merge the DeepSpeed JSON with the settings that belong to the recipe."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hypermoe_ds.config import closest
from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.topology import check_expert_parallel, gradient_accumulation_steps
from hypermoe_ds.training.settings import TrainConfig

if TYPE_CHECKING:
    from hypermoe_ds.modeling import HyperMoEConfig

# Keys that the JSON must not set, with the recipe setting to use instead.
_OWNED_BY_RECIPE: Mapping[str, str] = MappingProxyType(
    {
        "train_batch_size": "train.global_batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.global_batch_size",
        "gradient_clipping": "train.clip_grad_norm",
        "bf16": "train.precision",
        "bfloat16": "train.precision",
        "fp16": "train.precision",
        "seed": "train.seed",
        "optimizer": "optimizer",
        "scheduler": "schedule",
        "expert_parallel": "parallel.expert",
        "steps_per_print": "monitor.interval",
        "tensorboard": "monitor.tensorboard",
        "wandb": "monitor.wandb_project",
        "csv_monitor": "monitor.csv",
    }
)

_OFFLOAD = MappingProxyType({"device": str, "pin_memory": bool})

# Keys of DeepSpeed 0.19.8 that the JSON may set, with their types. DeepSpeed itself silently ignores unknown keys: with
# a misspelt {"zero_optimizaton": ...}, it would train with ZeRO stage 0.
_KNOWN: Mapping[str, Any] = MappingProxyType(
    {
        "zero_optimization": {
            "stage": int,
            "contiguous_gradients": bool,
            "reduce_scatter": bool,
            "reduce_bucket_size": int,
            "allgather_partitions": bool,
            "allgather_bucket_size": int,
            "overlap_comm": bool,
            "round_robin_gradients": bool,
            "sub_group_size": int,
            "stage3_prefetch_bucket_size": int,
            "stage3_param_persistence_threshold": int,
            "stage3_max_live_parameters": int,
            "stage3_max_reuse_distance": int,
            "offload_optimizer": {**_OFFLOAD, "ratio": float},
            "offload_param": _OFFLOAD,
        },
        "communication_data_type": str,
        "prescale_gradients": bool,
        "gradient_predivide_factor": float,
        "data_types": {"grad_accum_dtype": str},
        "wall_clock_breakdown": bool,
        "memory_breakdown": bool,
        "comms_logger": {
            "enabled": bool,
            "verbose": bool,
            "prof_all": bool,
            "debug": bool,
            "prof_ops": list,
        },
        "flops_profiler": {
            "enabled": bool,
            "profile_step": int,
            "module_depth": int,
            "top_modules": int,
            "detailed": bool,
            "output_file": str,
        },
    }
)
# Minimum values other than 0. With smaller values, DeepSpeed fails during training or silently changes the results.
_MINIMUM: Mapping[str, float] = MappingProxyType(
    {
        "reduce_bucket_size": 1,
        "allgather_bucket_size": 1,
        "sub_group_size": 1,
        "gradient_predivide_factor": 1e-6,
        "module_depth": -1,  # selects all modules
    }
)
_MAXIMUM: Mapping[str, float] = MappingProxyType({"ratio": 1})
_LARGEST = 10**15


def load_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON file.

    Raises:
        UserError: the file is unreadable, not JSON or nested too deeply; or a key is unknown or belongs to the recipe,
            or its value has the wrong type or is out of range.
    """
    try:
        return _load(path)
    except RecursionError:
        raise UserError(str(path), "is nested too deeply", "start from ds_configs/zero1.json") from None


def _load(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", "give a file in ds_configs/") from None
    except ValueError as error:
        raise UserError(str(path), f"is not JSON ({error})", "correct it or start from ds_configs/zero1.json") from None
    if not isinstance(content, dict):
        raise UserError(str(path), "is not a JSON object", "start from ds_configs/zero1.json")
    for key in content.keys() & _OWNED_BY_RECIPE.keys():
        raise UserError(f"{path}: {key}", "belongs to the recipe", f"remove it and set {_OWNED_BY_RECIPE[key]}")
    _check_keys(content, _KNOWN, str(path), "")
    return content


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys in a JSON object; Python's parser silently keeps the last value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"key '{names.most_common(1)[0][0]}' is given twice")
    return content


def _check_keys(content: Mapping[str, Any], known: Mapping[str, Any], path: str, prefix: str) -> None:
    for key, value in content.items():
        where = f"{path}: {prefix}{key}"
        if key not in known:
            raise UserError(where, "unknown key", closest(key, known))
        kind = known[key]
        if isinstance(kind, Mapping):
            if not isinstance(value, dict):
                raise UserError(f"{where}={value!r}", "is not an object", f"give one of {', '.join(sorted(kind))}")
            _check_keys(value, kind, path, f"{prefix}{key}.")
        elif not _fits(value, kind):
            raise UserError(
                f"{where}={value!r}", f"is not of type {kind.__name__}", f"give a value of type {kind.__name__}"
            )
        elif kind in (int, float) and not _MINIMUM.get(key, 0) <= value <= _MAXIMUM.get(key, _LARGEST):  # NaN fails too
            remedy = f"give {_MINIMUM.get(key, 0)} to {_MAXIMUM.get(key, _LARGEST):g}"
            raise UserError(f"{where}={value!r}", "is out of range", remedy)


def _fits(value: object, kind: type) -> bool:
    if kind is int and isinstance(value, float):
        return value.is_integer()  # bucket sizes are often written as 5e8
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def without_owned_by_recipe(merged: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merged configuration without the settings that were derived from the recipe and the model."""
    own = {key: value for key, value in merged.items() if key not in _OWNED_BY_RECIPE}
    zero = own.get("zero_optimization", {})
    return {**own, "zero_optimization": {key: value for key, value in zero.items() if key != "leaf_module"}}


def zero_stage(ds_json: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed JSON; 0 if the JSON does not set a stage."""
    return int(ds_json.get("zero_optimization", {}).get("stage", 0))


def _check_data_types(ds_json: Mapping[str, Any], precision: str) -> None:
    accumulate = ds_json.get("data_types", {}).get("grad_accum_dtype", precision)
    if accumulate not in ("fp32", precision):
        problem = f"does not fit train.precision={precision}"
        raise UserError(f"data_types.grad_accum_dtype={accumulate}", problem, f"set it to fp32 or {precision}")
    communicate = ds_json.get("communication_data_type", precision)
    if communicate not in ("fp32", "bf16", "fp16"):
        raise UserError(f"communication_data_type={communicate}", "is unknown", "set it to fp32, bf16 or fp16")


def _check_zero(ds_json: Mapping[str, Any], stage: int, moe: bool) -> None:
    """Refuse settings that DeepSpeed 0.19.8 ignores or that make it fail with a traceback."""
    zero = ds_json["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        device = zero.get(part, {}).get("device", "none")
        where = f"zero_optimization.{part}.device={device}"
        if device == "nvme":
            raise UserError(where, "is not supported, because checkpoints do not save state on NVMe", "set it to cpu")
        if device not in ("none", "cpu"):
            raise UserError(where, "is unknown", "set it to cpu or none")
        if part == "offload_param" and device == "cpu" and stage != 3:
            raise UserError(where, f"has no effect under stage {stage}", "use stage 3, or remove it")
    scatter = zero.get("reduce_scatter", True)
    if stage == 2 and not scatter and moe:
        where = "zero_optimization.reduce_scatter=false"
        raise UserError(where, "is not supported with a Mixture of Experts under stage 2", "remove it")
    if scatter and (ds_json.get("prescale_gradients") or ds_json.get("gradient_predivide_factor", 1) != 1):
        where = "prescale_gradients or gradient_predivide_factor"
        raise UserError(where, "is not supported with zero_optimization.reduce_scatter", "remove them")
    if scatter and stage != 3 and zero.get("allgather_bucket_size", 2) % 2:
        where = f"zero_optimization.allgather_bucket_size={zero['allgather_bucket_size']}"
        raise UserError(where, "is odd", "give an even number")


def merge(
    ds_json: Mapping[str, Any],
    train: TrainConfig,
    model: "HyperMoEConfig",
    expert_parallel_size: int,
    world_size: int,
) -> dict[str, Any]:
    """Return the DeepSpeed configuration: the JSON plus the settings that belong to the recipe.

    Raises:
        UserError: the batch sizes or the expert parallelism do not match the number of ranks, or a setting is not
            supported.
    """
    stage = zero_stage(ds_json)
    if stage not in (1, 2, 3):
        # In DeepSpeed 0.19.8 without ZeRO, the gradient norm depends on expert parallelism (measured: 0.563 and 0.551).
        raise UserError(f"zero_optimization.stage={stage}", "is not supported", "set it to 1, 2 or 3")
    _check_zero(ds_json, stage, bool(model.moe_layers))
    if model.moe_layers:
        check_expert_parallel(expert_parallel_size, model.num_experts, world_size)
    accumulation = gradient_accumulation_steps(train.global_batch_size, train.micro_batch_size, world_size)
    merged = {
        **ds_json,
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip_grad_norm,  # DeepSpeed's default is 1.0
        "steps_per_print": 2**31 - 1,  # the training loop prints its own lines instead
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16"},
    }
    _check_data_types(ds_json, train.precision)
    if train.precision == "bf16" and accumulation > 1 and "grad_accum_dtype" not in ds_json.get("data_types", {}):
        # Over 128 micro-batches, the first moment has an error of 1.1 % with bf16 accumulation and 0.3 % with fp32.
        merged["data_types"] = {"grad_accum_dtype": "fp32"}
    if model.moe_layers:
        from hypermoe_ds.parallel.expert_parallel import autoep_section  # noqa: PLC0415 (the module imports torch)

        merged["expert_parallel"] = autoep_section(
            expert_parallel_size, model.renormalises_gates, model.shared_expert_size > 0
        )
    if stage == 3:
        # HyperNetwork.forward reads the parameters of its submodules directly, so ZeRO 3 must gather all of them first.
        leaves = {"classes": ["HyperNetwork"]}
        merged["zero_optimization"] = {**merged["zero_optimization"], "leaf_module": leaves}
    return merged
