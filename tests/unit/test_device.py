"""Everywhere in the project, the device is the one that DeepSpeed's accelerator uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypermoe_ds.device import uses_gpu

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", None])
@pytest.mark.parametrize("gpu", [True, False])
def test_ds_accelerator_can_select_the_cpu_on_a_machine_with_a_gpu(
    accelerator: str | None, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator is not None:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert uses_gpu() == (gpu and accelerator != "cpu")


@pytest.mark.parametrize("accelerator", ["cpu", None])
def test_deepspeed_uses_the_same_device(accelerator: str | None) -> None:
    code = """
from deepspeed.accelerator import get_accelerator
from hypermoe_ds.device import uses_gpu
assert (get_accelerator().device_name() == "cuda") == uses_gpu()
"""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    if accelerator is not None:
        environment["DS_ACCELERATOR"] = accelerator
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=REPOSITORY)


def test_no_other_module_asks_torch_for_a_gpu() -> None:
    folders = ("hypermoe_ds", "pretrain", "tools", "launch", "benchmarks")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    asking = [path.name for path in files if "cuda.is_available" in path.read_text(encoding="utf-8")]
    assert asking == ["device.py"]
