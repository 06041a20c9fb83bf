"""Convert a Hugging Face folder to a run, and continue training from exactly the same weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hypermoe_ds.data.loader import validation_batches
from hypermoe_ds.data.validation_set import build_validation_set
from tests.helpers.corpus import TokenisedCorpus
from tests.helpers.jobs import TRAIN, arguments_of, run_script, small_recipe, write_recipe

RANKS, LENGTH = 2, 32
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
}
HYPER = [f"{key}=8" for key in ("expert_embedding_size", "selection_hidden_size", "bottleneck_size", "adapter_size")]


def convert(script: str, *arguments: object, folder: Path) -> str:
    done = run_script(f"tools/{script}.py", *arguments, folder=folder)
    assert done.returncode == 0, done.output()
    return done.stdout


@pytest.mark.parametrize("name", ["reference_run", "zero3_run"])
def test_a_run_exported_imported_and_exported_again_is_bit_identical(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: Path = request.getfixturevalue(name)
    convert("convert_to_hf", "--checkpoint", run, "--output", "first", folder=tmp_path)
    convert("convert_from_hf", "--checkpoint", "first", "--output", "run", folder=tmp_path)
    convert("convert_to_hf", "--checkpoint", "run", "--output", "second", folder=tmp_path)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == files
    assert "README.md" in files
    for file in set(files) - {"README.md"}:  # the model card records the steps of the run
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes(), file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "run", "second"]


def train(run: Path, corpus: TokenisedCorpus, *overrides: str, ranks: int = RANKS) -> list[dict[str, Any]]:
    """Train with the command that the converter prints, and return the logged records."""
    recipe = small_recipe(corpus, run) | yaml.safe_load((run / "resolved" / "model.yaml").read_text())
    recipe["data"]["tokenizer"] = str(run / "resolved" / "tokenizer")
    path = write_recipe(run.parent / "recipe.yaml", recipe)
    done = run_script(TRAIN, *arguments_of(path, *overrides), folder=run.parent, ranks=ranks)
    assert done.returncode == 0, done.output()
    assert "; new run\n" in done.stdout
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


STILL = ("train.steps=1", "schedule.warmup_steps=0", "optimizer.lr=1e-12")  # take a step without changing the weights


def test_training_continues_from_the_weights_of_an_export(
    reference_run: Path, corpus: TokenisedCorpus, tmp_path: Path
) -> None:
    convert("convert_to_hf", "--checkpoint", reference_run, "--output", "hf", folder=tmp_path)
    output = convert("convert_from_hf", "--checkpoint", "hf", "--output", "run", folder=tmp_path)
    assert re.search(r"^start: deepspeed pretrain/train.py .* run.dir=run train.precision=fp32$", output, re.MULTILINE)
    records = train(tmp_path / "run", corpus, *STILL)
    before = [json.loads(line) for line in (reference_run / "metrics.jsonl").read_text().splitlines()]
    [expected] = [record["valid_loss"] for record in before if "valid_loss" in record][-1:]
    assert records[-1]["valid_loss"] == pytest.approx(expected, abs=2e-6)
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json").read_text())
    assert manifest["kinds"] == ["weight", "exp_avg", "exp_avg_sq"]


@torch.no_grad()
def loss_of(model: PreTrainedModel, corpus: TokenisedCorpus) -> float:
    """Return the loss of a Transformers model on the validation samples."""
    samples = build_validation_set(corpus.valid, str(corpus.tokenizer), LENGTH, SIZES["vocab_size"])
    total, tokens = 0.0, 0
    for batch in validation_batches(samples, 8, rank=0, size=1, vocab_size=model.config.vocab_size):
        ids, labels = batch["input_ids"], batch["labels"]
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total, tokens = total + float(loss), tokens + int((labels != -100).sum())
    return total / tokens


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("llama", ["--upcycle", "--experts", 4, "--top-k", 2], 1e-5),
        ("llama", ["--upcycle", "--experts", 8, "--top-k", 4, "--granularity", 2], 1e-5),
        ("llama", ["--upcycle", "--experts", 4, "--top-k", 1], 1e-3),
        ("mixtral", [], 1e-5),
    ],
)
def test_a_converted_model_keeps_its_loss_in_evaluation_and_expert_parallel_training(
    kind: str, options: list[object], tolerance: float, corpus: TokenisedCorpus, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if kind == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    else:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None)).eval()
    model.save_pretrained(tmp_path / "theirs")
    arguments = ["--checkpoint", "theirs", "--tokenizer", corpus.tokenizer, "--output", "run", *options, *HYPER]
    convert("convert_from_hf", *arguments, folder=tmp_path)
    expected = loss_of(model, corpus)
    done = run_script("pretrain/evaluate.py", "--checkpoint", "run", "--data", corpus.valid, folder=tmp_path)
    assert done.returncode == 0, done.output()
    [loss] = re.findall(r"^loss ([\d.]+) ", done.stdout, re.MULTILINE)
    assert float(loss) == pytest.approx(expected, abs=tolerance)
    assert train(tmp_path / "run", corpus, *STILL, "parallel.expert=2")[-1]["valid_loss"] == pytest.approx(
        expected, abs=tolerance
    )


def test_an_upcycled_model_learns(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.02})).eval()
    model.save_pretrained(tmp_path / "theirs")
    options = ["--upcycle", "--experts", 4, "--top-k", 1, *HYPER, "--tokenizer", corpus.tokenizer]
    convert("convert_from_hf", "--checkpoint", "theirs", "--output", "run", *options, folder=tmp_path)
    records = train(tmp_path / "run", corpus, "parallel.expert=2", "train.steps=12")
    steps = [record for record in records if "loss" in record]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    ratios = [f"hyper_expert_norm_ratio/moe_layer_{layer}" for layer in range(2)]
    assert [steps[0][ratio] for ratio in ratios] == [0.0, 0.0]
    assert min(steps[-1][ratio] for ratio in ratios) > 0


BAD = {
    "dense": ("--checkpoint LLAMA --output new", "model_type='llama': is dense; give --upcycle --experts N --top-k K"),
    "no folder": ("--checkpoint none --output new", "none: is not a folder"),
    "taken": ("--checkpoint LLAMA --output TAKEN", "TAKEN: exists already"),
    "half of an option": (
        "--checkpoint LLAMA --output new --upcycle --experts 4",
        "--upcycle: needs --experts and --top-k",
    ),
    "no upcycling": ("--checkpoint LLAMA --output new --granularity 2", "--granularity=2: needs --upcycle"),
    "no tokenizer": ("--checkpoint LLAMA --output new --upcycle --experts 4 --top-k 1", "LLAMA: has no tokenizer"),
    "no field": (
        "--checkpoint LLAMA --output new adaptor_size=3",
        "adaptor_size: unknown key; did you mean 'adapter_size'?",
    ),
    "no value": ("--checkpoint LLAMA --output new adapter_size=wide", "adapter_size='wide': is not valid"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_failed_conversion_prints_one_line_and_writes_nothing(name: str, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "LLAMA")
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "thesis").touch()
    arguments, message = BAD[name]
    done = run_script("tools/convert_from_hf.py", *arguments.split(), folder=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LLAMA", "TAKEN"]
