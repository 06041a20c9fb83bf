"""accelerate keeps weights in host memory or on disk, and brings each to its module for that module's forward pass."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from model_references import VARIANTS, build, distance, tokens
from torch import Tensor

from hypermoe_ds.export.bake import bake
from hypermoe_ds.modeling import HyperMoEForCausalLM

KINDS = {
    "top-1": VARIANTS["top-1"],
    "route": {"hyper_conditioning": "route"},
    "top-2 of 16": {"num_experts": 16},  # more sets than are known before routing
    "dense and shared": VARIANTS["dense and shared"],
}
ON_DISK = {
    "a layer": ["model.layers.1"],
    "the hypernetwork": ["model.hypernetwork"],
    "maps of the hypernetwork": ["model.hypernetwork.down_weight", "model.hypernetwork.up_weight"],
    "all layers": ["model.layers.0", "model.layers.1", "model.layers.2", "model.hypernetwork", "model.norm"],
}


def device_map(model: HyperMoEForCausalLM, on_disk: list[str]) -> dict[str, str]:
    """Every module of `on_disk` there, every other in memory."""
    elsewhere = {}
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        if not any(f"{module}.".startswith(f"{part}.") for part in on_disk):
            elsewhere[module] = "cpu"
    return {**elsewhere, "lm_head": "cpu", **dict.fromkeys(on_disk, "disk")}


def check(offloaded: Any, model: HyperMoEForCausalLM) -> None:
    """Logits with and without gradients, and text, are those of the plain model."""
    ids, how = tokens(2, 9), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected: Tensor = model(input_ids=ids).logits
        assert distance(offloaded(input_ids=ids).logits, expected) < 1e-5
    assert distance(offloaded(input_ids=ids).logits, expected) < 1e-5
    assert torch.equal(offloaded.generate(ids, **how), model.generate(ids, **how))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_host_memory_computes_what_it_computes_on_its_device(kind: str) -> None:
    model = build(**KINDS[kind])
    check(cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")), model)


@pytest.mark.parametrize("where", ON_DISK)
@pytest.mark.parametrize("kind", KINDS)
def test_with_parts_on_disk_a_model_computes_what_it_computes_in_memory(kind: str, where: str, tmp_path: Path) -> None:
    model = build(**KINDS[kind])
    places = device_map(model, ON_DISK[where])
    check(dispatch_model(copy.deepcopy(model), places, main_device="cpu", offload_dir=tmp_path), model)


def test_baked_hyper_experts_may_be_offloaded_too(tmp_path: Path) -> None:
    model = bake(build(**KINDS["top-1"]))
    check(cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")), model)
    places = device_map(model, ["model.layers.0", "model.layers.1", "model.layers.2"])
    check(dispatch_model(copy.deepcopy(model), places, main_device="cpu", offload_dir=tmp_path), model)


def test_a_folder_loads_with_its_hypernetwork_on_disk(tmp_path: Path) -> None:
    model = build(**KINDS["top-1"])
    model.save_pretrained(tmp_path / "model")
    places = device_map(model, ["model.hypernetwork", "model.layers.2"])
    loaded = HyperMoEForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.model.hypernetwork.up_weight.weight.is_meta
    check(loaded, model)
