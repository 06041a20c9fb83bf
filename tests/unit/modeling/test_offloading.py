"""accelerate can offload weights to host memory or disk and load each module's weights for its forward pass."""

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
    "top-2 of 16": {"num_experts": 16},  # too many possible selections to generate before routing
    "dense and shared": VARIANTS["dense and shared"],
}
ON_DISK = {
    "a layer": ["model.layers.1"],
    "the hypernetwork": ["model.hypernetwork"],
    "linear layers of the hypernetwork": ["model.hypernetwork.down_weight", "model.hypernetwork.up_weight"],
    "all layers": ["model.layers.0", "model.layers.1", "model.layers.2", "model.hypernetwork", "model.norm"],
}


def device_map(model: HyperMoEForCausalLM, on_disk: list[str]) -> dict[str, str]:
    """Map the modules in `on_disk` to disk and all others to memory."""
    in_memory = {}
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        if not any(f"{module}.".startswith(f"{part}.") for part in on_disk):
            in_memory[module] = "cpu"
    return {**in_memory, "lm_head": "cpu", **dict.fromkeys(on_disk, "disk")}


def check(offloaded: Any, model: HyperMoEForCausalLM) -> None:
    """Compare logits, with and without gradients, and generated text with those of the plain model."""
    ids, options = tokens(2, 9), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected: Tensor = model(input_ids=ids).logits
        assert distance(offloaded(input_ids=ids).logits, expected) < 1e-5
    assert distance(offloaded(input_ids=ids).logits, expected) < 1e-5
    assert torch.equal(offloaded.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_cpu_offload_does_not_change_the_results(kind: str) -> None:
    model = build(**KINDS[kind])
    check(cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")), model)


@pytest.mark.parametrize("offloaded", ON_DISK)
@pytest.mark.parametrize("kind", KINDS)
def test_disk_offload_does_not_change_the_results(kind: str, offloaded: str, tmp_path: Path) -> None:
    model = build(**KINDS[kind])
    module_devices = device_map(model, ON_DISK[offloaded])
    check(dispatch_model(copy.deepcopy(model), module_devices, main_device="cpu", offload_dir=tmp_path), model)


def test_baked_hyper_experts_can_be_offloaded(tmp_path: Path) -> None:
    model = bake(build(**KINDS["top-1"]))
    check(cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")), model)
    module_devices = device_map(model, ["model.layers.0", "model.layers.1", "model.layers.2"])
    check(dispatch_model(copy.deepcopy(model), module_devices, main_device="cpu", offload_dir=tmp_path), model)


def test_a_folder_loads_with_the_hypernetwork_offloaded_to_disk(tmp_path: Path) -> None:
    model = build(**KINDS["top-1"])
    model.save_pretrained(tmp_path / "model")
    module_devices = device_map(model, ["model.hypernetwork", "model.layers.2"])
    loaded = HyperMoEForCausalLM.from_pretrained(
        tmp_path / "model", device_map=module_devices, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.model.hypernetwork.up_weight.weight.is_meta
    check(loaded, model)
