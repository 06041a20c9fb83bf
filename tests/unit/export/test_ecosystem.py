"""An exported folder works with Transformers, with and without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.helpers.jobs import REPOSITORY

PROMPTS = ["def read(path):", "import", "class Absent(Exception):\n    pass"]
GREEDY = {"do_sample": False, "max_new_tokens": 6}

# This script loads the folder with all auto classes and the pipeline. It cannot answer prompts, such as the one for
# trust_remote_code.
SCRIPT = """
import json, sys
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

torch.set_num_threads(1)
folder, preimport, trust, prompts, greedy = json.loads(sys.argv[1])
if preimport:
    __import__(preimport)
trusted = {} if trust is None else {"trust_remote_code": trust}
config = AutoConfig.from_pretrained(folder, **trusted)
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **trusted)
batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
decoder = AutoModel.from_pretrained(folder, **trusted)
with torch.no_grad():
    hidden = decoder(**batch).last_hidden_state
    same = torch.allclose(hidden, model(**batch, output_hidden_states=True).hidden_states[-1], atol=1e-5)
texts = tokenizer.batch_decode(model.generate(**batch, **greedy), skip_special_tokens=True)
generator = pipeline("text-generation", model=folder, device="cpu", **trusted)
config_made = AutoModelForCausalLM.from_config(config, **trusted)
print(json.dumps({
    "module": type(model).__module__,
    "classes": [type(part).__name__ for part in (config, model, generator.model, config_made)],
    "decoder": [type(decoder).__name__, same],
    "listed": (config.model_type, type(model).__name__) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(),
    "texts": texts,
    "piped": [texts[0]["generated_text"] for texts in generator(prompts, batch_size=2, **greedy)],
    "ours": [name for name, module in sys.modules.items() if module and name == "hypermoe_ds"],
}))
"""


def run_script(folder: Path, preimport: str | None, trust: bool | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run SCRIPT, which can import this package only if `preimport` names a module to import first."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment = inherited | {"HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "1"}
    absent = "" if preimport else "import sys\nsys.modules['hypermoe_ds'] = None\n"  # hides an installed package
    return subprocess.run(
        [sys.executable, "-c", absent + SCRIPT, json.dumps([str(folder), preimport, trust, PROMPTS, GREEDY])],
        cwd=cwd, env=environment | ({"PYTHONPATH": str(REPOSITORY)} if preimport else {}), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def expected(exported: Path) -> list[str]:
    """Return the continuation of each prompt, generated alone without padding or pipeline."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        texts.append(tokenizer.decode(model.generate(ids, **GREEDY)[0], skip_special_tokens=True))
    assert len(set(texts)) == len(PROMPTS)
    return texts


@pytest.mark.parametrize(
    ("preimport", "trust"),
    [("hypermoe_ds.modeling", None), ("hypermoe_ds.modeling", True), (None, True)],
    ids=["package", "package, trust_remote_code", "no package, trust_remote_code"],
)
def test_a_folder_generates_the_same_with_and_without_the_package_and_does_not_warn(
    exported: Path, expected: list[str], preimport: str | None, trust: bool | None, tmp_path: Path
) -> None:
    process = run_script(exported, preimport, trust, tmp_path)
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout.splitlines()[-1])
    assert seen["classes"] == ["HyperMoEConfig", *["HyperMoEForCausalLM"] * 3]
    assert seen["decoder"] == ["HyperMoEModel", True]
    assert seen["module"].startswith("hypermoe_ds.modeling" if preimport else "transformers_modules.")
    assert seen["ours"] == (["hypermoe_ds"] if preimport else [])
    assert seen["listed"], "the Trainer's label smoothing would not shift the labels"
    assert seen["texts"] == expected
    assert seen["piped"] == expected
    output = (process.stdout.rpartition("\n{")[0] + process.stderr).lower()
    for word in ("remote code", "trust_remote_code", "warning", "not supported", "not initialized", "deprecated"):
        assert word not in output, output


def test_without_the_package_loading_asks_for_trust_remote_code(exported: Path, tmp_path: Path) -> None:
    process = run_script(exported, None, False, tmp_path)
    assert process.returncode != 0
    assert "trust_remote_code=True" in process.stderr


def test_pipeline_sampling_depends_on_the_seed(exported: Path) -> None:
    generator = pipeline("text-generation", model=str(exported), device="cpu")

    def generate(seed: int, **arguments: Any) -> str:
        torch.manual_seed(seed)
        return str(generator(PROMPTS[0], max_new_tokens=8, do_sample=True, **arguments)[0]["generated_text"])

    assert generate(1) == generate(1) == generate(1, use_cache=False) != generate(2)


def test_a_padded_batch_gives_the_logits_of_each_text_alone(exported: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = model(**batch).logits  # the batch includes all other outputs of the tokenizer
            for row, prompt in enumerate(PROMPTS):
                alone = model(**tokenizer(prompt, return_tensors="pt")).logits[0]
                assert torch.allclose(logits[row][batch["attention_mask"][row].bool()], alone, atol=1e-4)
