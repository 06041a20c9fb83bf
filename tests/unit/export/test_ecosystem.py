"""An exported folder works with Transformers' own commands, where this package is installed and where it is not."""

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

# All ways to load, and the pipeline, in a process of their own; without an answer to any question.
USE = """
import json, sys
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

torch.set_num_threads(1)
folder, first, trust, prompts, greedy = json.loads(sys.argv[1])
if first:
    __import__(first)
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
writer = pipeline("text-generation", model=folder, device="cpu", **trusted)
config_made = AutoModelForCausalLM.from_config(config, **trusted)
print(json.dumps({
    "module": type(model).__module__,
    "classes": [type(config).__name__, type(model).__name__, type(writer.model).__name__, type(config_made).__name__],
    "decoder": [type(decoder).__name__, same],
    "listed": (config.model_type, type(model).__name__) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(),
    "texts": texts,
    "piped": [texts[0]["generated_text"] for texts in writer(prompts, batch_size=2, **greedy)],
    "ours": [name for name, module in sys.modules.items() if module and name == "hypermoe_ds"],
}))
"""


def used(folder: Path, first: str | None, trust: bool | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run USE; only with `first`, the module to import beforehand, this package can be found."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment = inherited | {"HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "1"}
    absent = "" if first else "import sys\nsys.modules['hypermoe_ds'] = None\n"  # even where it is installed
    return subprocess.run(
        [sys.executable, "-c", absent + USE, json.dumps([str(folder), first, trust, PROMPTS, GREEDY])],
        cwd=cwd, env=environment | ({"PYTHONPATH": str(REPOSITORY)} if first else {}), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def expected(exported: Path) -> list[str]:
    """Each prompt continued alone, with neither padding nor pipeline."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        texts.append(tokenizer.decode(model.generate(ids, **GREEDY)[0], skip_special_tokens=True))
    assert len(set(texts)) == len(PROMPTS)
    return texts


@pytest.mark.parametrize(
    ("first", "trust"),
    [("hypermoe_ds.modeling", None), ("hypermoe_ds.modeling", True), (None, True)],
    ids=["package", "package, trusting", "no package, trusting"],
)
def test_a_folder_generates_the_same_here_and_elsewhere_without_a_question_or_a_warning(
    exported: Path, expected: list[str], first: str | None, trust: bool | None, tmp_path: Path
) -> None:
    done = used(exported, first, trust, tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["classes"] == ["HyperMoEConfig", *["HyperMoEForCausalLM"] * 3]
    assert seen["decoder"] == ["HyperMoEModel", True]
    assert seen["module"].startswith("hypermoe_ds.modeling" if first else "transformers_modules.")
    assert seen["ours"] == (["hypermoe_ds"] if first else [])
    assert seen["listed"], "the Trainer's label smoothing would not shift the labels"
    assert seen["texts"] == expected
    assert seen["piped"] == expected
    told = (done.stdout.rpartition("\n{")[0] + done.stderr).lower()
    for word in ("remote code", "trust_remote_code", "warning", "not supported", "not initialized", "deprecated"):
        assert word not in told, told


def test_without_the_package_and_without_trust_it_is_refused_and_names_the_argument(
    exported: Path, tmp_path: Path
) -> None:
    done = used(exported, None, False, tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_the_pipeline_samples_by_the_seed(exported: Path) -> None:
    writer = pipeline("text-generation", model=str(exported), device="cpu")

    def write(seed: int, **arguments: Any) -> str:
        torch.manual_seed(seed)
        return str(writer(PROMPTS[0], max_new_tokens=8, do_sample=True, **arguments)[0]["generated_text"])

    assert write(1) == write(1) == write(1, use_cache=False) != write(2)


def test_a_padded_batch_of_the_tokenizer_gives_each_texts_own_logits(exported: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = model(**batch).logits  # with whatever else the tokenizer gives
            for row, prompt in enumerate(PROMPTS):
                alone = model(**tokenizer(prompt, return_tensors="pt")).logits[0]
                assert torch.allclose(logits[row][batch["attention_mask"][row].bool()], alone, atol=1e-4)
