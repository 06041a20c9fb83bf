"""lm-evaluation-harness evaluates an exported folder without changes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: bash launch/setup.sh eval"),
]

CHOICES = [" self", " import os", ":\n    return None"]
# The questions have no trailing spaces, because the harness would move such spaces to the choices.
QUESTIONS = ["def read(path):", "class", "import", "for name in names", "x ="]
DOCUMENTS = [{"question": text, "answer": row % len(CHOICES)} for row, text in enumerate(QUESTIONS)]
# The second text exceeds max_position_embeddings.
TEXTS = ["def add(a, b):\n    return a + b\n", "import os\nimport sys\n" * 12]


def write_tasks(folder: Path) -> None:
    """Write a multiple-choice task and a perplexity task with local data."""
    for name, rows in (("choice", DOCUMENTS), ("text", [{"text": text} for text in TEXTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {"task": f"tiny_{name}", "dataset_path": "json", "test_split": "test"}
        common["dataset_kwargs"] = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | TASKS[name]))


TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": CHOICES,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


def log_likelihood(model: Any, tokenizer: Any, text: str, choice: str) -> float:
    """Return the log-likelihood of the tokens of `choice` after `text`, computed without batching."""
    ids = tokenizer(text + choice, return_tensors="pt")["input_ids"]
    prompt_length = len(tokenizer(text)["input_ids"])
    with torch.no_grad():
        log_p = F.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
    return float(log_p.gather(1, ids[0, 1:, None]).squeeze(1)[prompt_length - 1 :].sum())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_harness_computes_the_log_likelihoods_and_accuracy_of_the_model(
    exported: Path, batch_size: int, tmp_path: Path
) -> None:
    write_tasks(tmp_path)
    process = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", str(batch_size),
            "--model_args", f"pretrained={exported},trust_remote_code=True", "--tasks", "tiny_choice,tiny_text",
            "--include_path", str(tmp_path), "--log_samples", "--output_path", str(tmp_path / "out"),
        ],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    [samples] = (tmp_path / "out").rglob("samples_tiny_choice*.jsonl")
    [results] = (tmp_path / "out").rglob("results*.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    correct = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        seen = [float(response[0][0]) for response in sample["resps"]]
        expected = [log_likelihood(model, tokenizer, sample["doc"]["question"], choice) for choice in CHOICES]
        assert seen == pytest.approx(expected, abs=1e-3)
        correct += max(range(len(CHOICES)), key=expected.__getitem__) == sample["doc"]["answer"]
    metrics = json.loads(results.read_text())["results"]
    assert metrics["tiny_choice"]["acc,none"] == pytest.approx(correct / len(DOCUMENTS))
    assert 1 < metrics["tiny_text"]["byte_perplexity,none"] < 1e6
