"""A saved model loads bit for bit, with and without this package."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_references import PATHS, SMALL, VARIANTS, build, tokens
from transformers import AutoModelForCausalLM

from hypermoe_ds import modeling
from hypermoe_ds.modeling import HyperMoEForCausalLM

VOCABULARY = SMALL["vocab_size"]


def with_copied_weights(model: HyperMoEForCausalLM) -> HyperMoEForCausalLM:
    """Copy the weights, because the alignment of weights mapped from a file changes the last bits of products."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@pytest.mark.parametrize("variant", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_loads_bit_for_bit(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(**VARIANTS[variant]).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is HyperMoEForCausalLM
    assert loaded.dtype is dtype
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is model.config.tie_word_embeddings
    ids = tokens(2, 9)
    assert torch.equal(with_copied_weights(loaded)(input_ids=ids).logits, model(input_ids=ids).logits)


LOAD_WITHOUT_PACKAGE = """
import importlib.abc, sys, pathlib

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hypermoe_ds":
            raise ImportError("hypermoe_ds is not installed")

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "HyperMoEConfig"
assert not [name for name in sys.modules if name.split(".")[0] == "hypermoe_ds"]
for parameter in model.parameters():
    parameter.data = parameter.data.clone()
ids = torch.load(folder / "ids.pt")
generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
torch.save({"logits": model(input_ids=ids).logits, "generated": generated}, folder / "seen.pt")
model.save_pretrained(folder / "again")
"""


def test_a_saved_folder_loads_without_this_package(tmp_path: Path) -> None:
    model, ids = build(**VARIANTS["dense and shared"], tie_word_embeddings=False), tokens(2, 9)
    folder, other_folder = tmp_path / "model", tmp_path / "other_folder"
    other_folder.mkdir()
    model.save_pretrained(folder)
    torch.save(ids, folder / "ids.pt")
    script = other_folder / "load.py"
    script.write_text(LOAD_WITHOUT_PACKAGE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(other_folder)}
    process = subprocess.run(
        [sys.executable, "-I", script, folder],
        cwd=other_folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    seen = torch.load(folder / "seen.pt")
    assert torch.equal(seen["logits"], model(input_ids=ids).logits)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(seen["generated"], expected)
    # Saving the loaded model also writes its code.
    python = {path.name for path in folder.glob("*.py")}
    assert python == {path.name for path in (folder / "again").glob("*.py")}
    assert python == {path.name for path in Path(modeling.__file__).parent.glob("*.py")} - {"__init__.py"}
    for path in folder.glob("*.py"):
        assert path.read_bytes() == Path(inspect.getfile(HyperMoEForCausalLM)).with_name(path.name).read_bytes()


def test_missing_weights_are_initialised_and_the_others_loaded(tmp_path: Path) -> None:
    model = build()
    missing = {"model.layers.1.mlp.experts.down_proj", "model.hypernetwork.up_weight.weight"}
    state = {name: value for name, value in model.state_dict().items() if name not in missing}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = HyperMoEForCausalLM.from_pretrained(tmp_path)
    changed = {name for name, value in loaded.named_parameters() if not torch.equal(value, model.get_parameter(name))}
    assert changed == missing
    assert loaded.model.hypernetwork.up_weight.weight.abs().max() <= 1e-3 * (3 / (11 * 8)) ** 0.5
    assert loaded.model.layers[1].mlp.experts.down_proj.std() > 0
