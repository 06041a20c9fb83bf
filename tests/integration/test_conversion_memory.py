"""Conversions need memory for about one weight file or one layer, not for the full model."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hypermoe_ds.checkpoint.init_from_weights import init_from_weights
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.weights import open_weights
from hypermoe_ds.export.from_hf import open_folder
from hypermoe_ds.modeling import HyperMoEConfig, state_dict_shapes
from hypermoe_ds.run_config import model_section
from hypermoe_ds.training.state import TrainState
from tests.helpers.corpus import TokenisedCorpus
from tests.helpers.jobs import REPOSITORY

# This program runs a script and prints by how much the script raised the peak memory of the process, including
# memory-mapped files.
MEASURED = """
import re, runpy, sys
from pathlib import Path

import safetensors.torch, torch, transformers
from hypermoe_ds import run_config
from hypermoe_ds.export import from_hf, hf

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current memory
before = peak()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("raised by", peak() - before)
"""
MB = 10**6
CONFIG = HyperMoEConfig(
    vocab_size=512, hidden_size=512, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8,
    moe_intermediate_size=768, num_experts=8, num_experts_per_tok=2, bottleneck_size=16, adapter_size=16,
)  # fmt: skip


def random_weights() -> Iterator[tuple[str, Tensor]]:
    for name, shape in state_dict_shapes(CONFIG).items():
        yield name, torch.randn(shape).mul_(0.02)


def raised_by(script: str, *arguments: object) -> int:
    """Return by how many bytes a script raised the peak memory of its process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(REPOSITORY / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("raised by ")[2])


@pytest.fixture(scope="module")
def run(corpus: TokenisedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "run"
    settings = {"model": model_section(CONFIG), "train": {"precision": "fp32"}}
    init_from_weights(folder, CONFIG, random_weights(), corpus.tokenizer, settings, TrainState().to_dict())
    return folder


def test_conversions_need_little_memory_and_a_round_trip_is_bitwise_identical(run: Path, tmp_path: Path) -> None:
    model = 4 * CONFIG.parameter_counts().total
    layer = model // CONFIG.num_hidden_layers
    to_hf = raised_by(
        "tools/convert_to_hf.py", "--checkpoint", run, "--output", tmp_path / "hf", "--max-shard-size", "50MB"
    )  # fmt: skip
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 8
    back = raised_by("tools/convert_from_hf.py", "--checkpoint", tmp_path / "hf", "--output", tmp_path / "back")
    sizes = f"model {model / MB:.0f} MB, layer {layer / MB:.0f} MB, to hf {to_hf / MB:.0f} MB, back {back / MB:.0f} MB"
    assert max(to_hf, back) < model / 2, sizes
    print(sizes)
    with open_weights(RunFolder(tmp_path / "back")) as found:
        expected = open_folder(tmp_path / "hf")
        assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.shapes)
