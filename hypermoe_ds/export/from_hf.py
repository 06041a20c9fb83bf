"""Read the initial weights of a run from a Hugging Face folder.

The folder contains a HyperMoE model, another Mixture of Experts, or a dense model.

Shape legend: D hidden size, N experts, F expert width.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.expert_layout import split_gate_up
from hypermoe_ds.checkpoint.hf_folder import checked_shapes, hypermoe_config, read_config
from hypermoe_ds.checkpoint.safetensors_folder import FolderWeights, Reader, TrackedTensors
from hypermoe_ds.errors import UserError
from hypermoe_ds.export.hf_config_mapping import DENSE, model_type, refuse_unknown, shape_of
from hypermoe_ds.export.init_hyper_experts import init_hyper_experts
from hypermoe_ds.export.upcycle import Upcycling
from hypermoe_ds.export.weight_loader import LazyWeights, read_folder
from hypermoe_ds.modeling import HyperMoEConfig, state_dict_shapes

# Configuration fields that the weights of a model without HyperExperts do not determine.
OPEN_FIELDS = (
    "router_dtype",
    "router_aux_loss_coef",
    "router_aux_loss_scope",
    "z_loss_coef",
    "hypernetwork",
    "hyper_conditioning",
    "expert_embedding_size",
    "selection_hidden_size",
    "hypernetwork_input_size",
    "layer_embedding_size",
    "bottleneck_size",
    "adapter_size",
)
_FIELDS = set(HyperMoEConfig.__annotations__) - {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
_EXPERTS = re.compile(
    r"(?P<layer>model\.layers\.\d+)\.mlp\.(?P<part>experts\.gate_up_proj|experts\.down_proj|router\.gate\.weight)"
)
_MIXTRAL = ("block_sparse_moe", "w1", "w3", "w2")
_OTHERS = ("mlp", "gate_proj", "up_proj", "down_proj")


def open_folder(
    folder: Path, upcycling: Upcycling | None = None, fields: Mapping[str, Any] | None = None, seed: int = 0
) -> LazyWeights:
    """Open the tensors of a Hugging Face folder as the initial weights of a run.

    Args:
        folder: a Hugging Face folder with safetensors files.
        upcycling: how to convert a dense model; None for a Mixture of Experts.
        fields: values of `OPEN_FIELDS`, if the model has no HyperExperts.
        seed: seed for initialising HyperExperts, if the model is a Mixture of Experts without HyperExperts.

    Raises:
        UserError: HyperMoE cannot express the model; the error names a configuration key and its value, or a tensor.
    """
    kind = model_type(folder)
    if kind == "hypermoe":
        _refuse_options(upcycling, fields)
        return _hypermoe(folder)
    shape = shape_of(folder)
    if kind in DENSE and upcycling is None:
        raise UserError(f"{folder}: model_type={kind!r}", "is dense", "give --upcycle --experts N --top-k K")
    if kind not in DENSE and upcycling is not None:
        raise UserError("--upcycle", f"{folder} already has experts (model_type={kind!r})", "remove it")
    for key in fields or {}:
        if key not in OPEN_FIELDS:
            raise UserError(
                f"{key}={(fields or {})[key]!r}",
                "is determined by the weights",
                f"only these can be set: {', '.join(OPEN_FIELDS)}",
            )
    made = upcycling.fields(shape["intermediate_size"]) if upcycling is not None else {}
    config = hypermoe_config(folder, {**shape, **made, **(fields or {})})
    taken = TrackedTensors(FolderWeights(folder))
    checked_shapes(folder, config, taken.files.shapes)
    readers = _readers(taken, config, upcycling, _MIXTRAL if kind == "mixtral" else _OTHERS)
    taken.refuse_unused(config)
    initialised = init_hyper_experts(config, upcycling.seed if upcycling is not None else seed)
    readers |= {name: partial(initialised.__getitem__, name) for name in initialised}
    return LazyWeights(config, taken.files.dtype, readers)


def _refuse_options(upcycling: Upcycling | None, fields: Mapping[str, Any] | None) -> None:
    if upcycling is not None:
        raise UserError("--upcycle", "the model is already a HyperMoE model", "remove it")
    for key, value in (fields or {}).items():
        raise UserError(f"{key}={value!r}", "the model is already a HyperMoE model", "remove it")


def _hypermoe(folder: Path) -> LazyWeights:
    """Open the tensors of a HyperMoE model."""
    raw = read_config(folder)
    refuse_unknown(folder, raw, HyperMoEConfig.__annotations__.keys())
    if raw.get("baked_hyper_experts", False) is not False:
        raise UserError(
            f"{folder / 'config.json'}: baked_hyper_experts=True",
            "the model has no hypernetwork to train",
            "give a folder that was exported without --bake",
        )
    # Keep only the fields that a recipe sets, because the other fields depend on the tokenizer and the export.
    config = hypermoe_config(folder, {key: value for key, value in raw.items() if key in _FIELDS})
    return read_folder(folder, config)


def _readers(
    taken: TrackedTensors, model_config: HyperMoEConfig, upcycling: Upcycling | None, names: tuple[str, str, str, str]
) -> dict[str, Reader]:
    """Return a reader for each tensor except those of the HyperExperts."""
    readers: dict[str, Reader] = {}
    for name, shape in state_dict_shapes(model_config).items():
        if ".hyper_experts." in name or name.startswith("model.hypernetwork."):
            continue
        match = _EXPERTS.fullmatch(name)
        if match is None:
            readers[name] = taken.reader(name, shape)
        elif upcycling is not None:
            readers[name] = _upcycled(taken, model_config, upcycling, name, match)
        elif match["part"] == "router.gate.weight":
            block = "mlp" if taken.holds(f"{match['layer']}.mlp.gate.weight") else names[0]
            readers[name] = taken.reader(f"{match['layer']}.{block}.gate.weight", shape)
        elif taken.holds(name):  # the experts are stacked, as in Transformers' models
            readers[name] = taken.reader(name, shape)
        else:
            readers[name] = _one_by_one(taken, f"{match['layer']}.{names[0]}.experts", match["part"], names, shape)
    return readers


def _upcycled(
    taken: TrackedTensors, model_config: HyperMoEConfig, upcycling: Upcycling, name: str, match: re.Match[str]
) -> Reader:
    """Return the reader of a router or expert tensor of an upcycled model."""
    D, width = model_config.hidden_size, model_config.intermediate_size

    def dense(projection: str) -> Reader:
        shape = (D, width) if projection == "down_proj" else (width, D)
        return taken.reader(f"{match['layer']}.mlp.{projection}.weight", shape)

    if match["part"] == "experts.gate_up_proj":
        return partial(upcycling.gate_up, name, dense("gate_proj"), dense("up_proj"))
    if match["part"] == "experts.down_proj":
        return partial(upcycling.down, name, dense("down_proj"))
    return partial(upcycling.router, name, model_config)


def _one_by_one(
    taken: TrackedTensors, block: str, part: str, names: tuple[str, str, str, str], shape: tuple[int, ...]
) -> Reader:
    """Return a reader that stacks separately stored experts: `gate_up_proj` [N, 2F, D] or `down_proj` [N, D, F]."""
    N, rows, columns = shape
    _, gate, up, down = names
    halves = [gate, up] if part == "experts.gate_up_proj" else [down]
    readers = [
        [taken.reader(f"{block}.{expert}.{half}.weight", (rows // len(halves), columns)) for expert in range(N)]
        for half in halves
    ]

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=taken.files.dtype)
        targets = split_gate_up(whole) if len(halves) == 2 else (whole,)
        for target, of_half in zip(targets, readers, strict=True):
            for expert_view, of_expert in zip(target, of_half, strict=True):
                expert_view.copy_(of_expert())
        return whole

    return read
