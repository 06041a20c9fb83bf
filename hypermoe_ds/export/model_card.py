"""Write an exported folder's README.md, which is the model card on the Hugging Face Hub."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig

PAPER = "https://arxiv.org/abs/2402.12656"
_LARGEST_EXPONENT = 700.0  # the exponential of larger values overflows a float
_HEADER = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["hypermoe", "mixture-of-experts", "causal-lm", "deepspeed"],
}


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained; unknown values are None.

    Attributes:
        data: for each dataset name, the dataset's share of the training samples.
        step: optimizer steps taken.
        tokens: tokens consumed.
        sequence_length: tokens per sample.
        document_mask: whether the documents in a sample were separated.
        precision: precision of weights and activations.
        valid_loss: validation loss of these weights, in nats per token.
        written_by: git commit and package versions with which the checkpoint was written.
    """

    data: Mapping[str, float]
    step: int | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    document_mask: bool = False
    precision: str | None = None
    valid_loss: float | None = None
    written_by: Mapping[str, str] | None = None


_CHECKED = TypeAdapter(TrainingRecord)


def training_record(
    settings: Mapping[str, Any],
    step: int,
    consumed_samples: int | None = None,
    valid_loss: float | None = None,
    written_by: Mapping[str, str] | None = None,
) -> TrainingRecord:
    """Build the training record of a checkpoint.

    Args:
        settings: the resolved recipe; missing values are recorded as unknown.
        step: step of the checkpoint.
        consumed_samples: number of sequences consumed; if None, `step` global batches are assumed.
        valid_loss: validation loss at that step; None if the step was not validated.
        written_by: git commit and package versions.

    Raises:
        UserError: the settings are not a valid resolved recipe.
    """
    try:
        return _build_record(settings, step, consumed_samples, valid_loss, written_by)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        problem = f"is not a resolved recipe ({error!r:.100})"
        raise UserError("resolved/config.yaml", problem, "restore that file in the run folder") from None


def _build_record(
    settings: Mapping[str, Any],
    step: int,
    consumed_samples: int | None,
    valid_loss: float | None,
    written_by: Mapping[str, str] | None,
) -> TrainingRecord:
    data, train = settings.get("data", {}), settings.get("train", {})
    length, batch = data.get("sequence_length"), train.get("global_batch_size")
    if consumed_samples is None and batch is not None:
        consumed_samples = step * batch
    weights = [(Path(dataset["prefix"]).name, dataset.get("weight", 1.0)) for dataset in data.get("train", ())]
    total = sum(weight for _, weight in weights)
    shares: dict[str, float] = dict.fromkeys((name for name, _ in weights), 0.0)
    for name, weight in weights:
        shares[name] += weight / total
    tokens = None if consumed_samples is None or length is None else consumed_samples * length
    return _CHECKED.validate_python(
        {
            "data": shares,
            "step": step,
            "tokens": tokens,
            "sequence_length": length,
            "document_mask": data.get("document_mask", False),
            "precision": train.get("precision"),
            "valid_loss": valid_loss,
            "written_by": written_by,
        }
    )


def write_model_card(
    folder: Path, model_config: HyperMoEConfig, training: TrainingRecord | None = None, command: str | None = None
) -> None:
    """Write README.md to an exported folder.

    Args:
        folder: the Hugging Face folder.
        model_config: configuration of the model.
        training: how the model was trained, if known.
        command: the command that created the folder.
    """
    (folder / "README.md").write_text(model_card(folder.name, model_config, training, command), encoding="utf-8")


def model_card(
    name: str, model_config: HyperMoEConfig, training: TrainingRecord | None = None, command: str | None = None
) -> str:
    """Return the text of the card: YAML front matter, architecture, training and usage."""
    header = yaml.safe_dump(_HEADER, sort_keys=False)
    parts = [
        f"---\n{header}---\n",
        f"# {name}\n",
        f"A decoder language model with {_kind(model_config)}.\n",
        "## Model\n",
        _table(_architecture(model_config)),
    ]
    if training is not None:
        parts += ["## Training\n", _table(_training(training))]
    parts += ["## Use\n", _usage()]
    if command:
        parts += ["## Export command\n", f"```\n{command}\n```\n"]
    return "\n".join(parts)


def _kind(model_config: HyperMoEConfig) -> str:
    if not model_config.moe_layers:
        return "dense layers"
    if not model_config.hypernetwork:
        return "Mixtures of Experts"
    hyper_experts = f"HyperExperts ([HyperMoE]({PAPER}))"
    how = "baked into the weights" if model_config.baked_hyper_experts else "generated by a hypernetwork"
    return f"Mixtures of Experts and {hyper_experts}, {how}"


def _architecture(model_config: HyperMoEConfig) -> Iterator[tuple[str, str]]:
    counts = model_config.parameter_counts()
    yield "parameters", f"{counts.total:,}"
    yield "active parameters per token", f"{counts.active:,}"
    if counts.hypernetwork:
        part = "baked HyperExperts" if model_config.baked_hyper_experts else "hypernetwork and encoders"
        yield f"parameters of the {part}", f"{counts.hypernetwork:,}"
    moe = len(model_config.moe_layers)
    yield "layers", f"{model_config.num_hidden_layers}, {moe} of them with a Mixture of Experts"
    yield "hidden size", f"{model_config.hidden_size:,}"
    yield (
        "attention",
        f"{model_config.num_attention_heads} query heads, {model_config.num_key_value_heads} key-value heads",
    )
    if moe:
        yield "experts", f"{model_config.num_experts} per layer, {model_config.num_experts_per_tok} per token"
        yield "expert width", f"{model_config.moe_intermediate_size:,}"
    if moe and model_config.shared_expert_size:
        yield "shared expert width", f"{model_config.shared_expert_size:,}"
    if moe and model_config.hypernetwork:
        yield (
            "HyperExpert width",
            f"{model_config.adapter_size:,}, conditioned on the {model_config.hyper_conditioning}",
        )
    yield "vocabulary", f"{model_config.vocab_size:,} tokens"
    yield "maximum sequence length", f"{model_config.max_position_embeddings:,} tokens"


def _training(training: TrainingRecord) -> Iterator[tuple[str, str]]:
    shares = ", ".join(f"{name} ({share:.1%})" for name, share in training.data.items())
    if training.data:
        yield "data", shares if len(training.data) > 1 else next(iter(training.data))
    if training.tokens is not None:
        yield "tokens seen", f"{training.tokens:,}"
    if training.step is not None:
        yield "optimizer steps", f"{training.step:,}"
    if training.sequence_length is not None:
        yield "sequence length", f"{training.sequence_length:,} tokens"
    if training.document_mask:
        yield "documents", "masked: no token attends to another document, and positions restart in each document"
    if training.precision is not None:
        yield "precision", training.precision
    if training.valid_loss is not None:
        loss = training.valid_loss
        perplexity = f" (perplexity {math.exp(loss):,.2f})" if loss < _LARGEST_EXPONENT else ""
        yield "validation loss", f"{loss:.4f} nats per token{perplexity}"
    for package, version in (training.written_by or {}).items():
        if version != "unknown":
            yield package.replace("_", " "), version


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "".join(["| | |\n| --- | --- |\n", *(f"| {name} | {value} |\n" for name, value in rows)])


def _usage() -> str:
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

The modeling files in this folder need only torch and Transformers. If HyperMoE-DS is installed, `import
hypermoe_ds.modeling` replaces them, and `trust_remote_code` is not needed.
"""
