"""Define the settings of a recipe for training: length, optimizer, schedule and evaluation."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hypermoe_ds.config import LARGEST_COUNT, Settings


def as_whole_number(value: Any) -> Any:
    """Convert a float without a fraction, such as 300e9 in YAML, to an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


SampleRange = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_COUNT**2)]], Field(min_length=2, max_length=2)]


class TrainConfig(Settings):
    """Length, batch and precision of a run."""

    steps: int = Field(
        ge=1,
        le=LARGEST_COUNT,
        description="length of the run in optimizer steps, unless `train.tokens` gives it; the schedule spans it",
    )
    tokens: Annotated[int | None, BeforeValidator(as_whole_number)] = Field(
        None,
        ge=1,
        le=LARGEST_COUNT**3,
        description="length of the run in tokens, such as 300e9, instead of `train.steps`; rounded up to whole steps",
    )
    stop_at_step: int | None = Field(
        None, ge=1, le=LARGEST_COUNT, description="save and end this launch after that step"
    )
    micro_batch_size: int = Field(ge=1, le=LARGEST_COUNT, description="sequences of one forward pass on one rank")
    global_batch_size: int = Field(ge=1, le=LARGEST_COUNT, description="sequences of one optimizer step over all ranks")
    seed: int = Field(1234, ge=0, lt=2**32, description="seed of the initial weights and of the order of the data")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="precision of weights and activations")
    clip_grad_norm: float = Field(1.0, ge=0, le=1e6, description="largest norm of the gradient; 0 does not clip")
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")
    collective_timeout: float = Field(
        1800,
        ge=1,
        le=30 * 24 * 3600,
        description="seconds without progress of this rank after which a lost or hanging rank ends the job",
    )
    max_bad_steps: int = Field(
        20,
        ge=0,
        le=LARGEST_COUNT,
        description="tolerated number of steps in a row that are skipped for a NaN or Inf in loss or gradient",
    )
    skip_samples: list[SampleRange] = Field(
        [], description="`[[first, last], ...]`, ranges of sample indices to skip, in the order of the training samples"
    )
    consistency_interval: int | None = Field(
        1000,
        ge=1,
        le=LARGEST_COUNT,
        description="steps between two comparisons of the ranks' replicas of parameters; null never compares",
    )


class OptimizerConfig(Settings):
    """AdamW (arXiv 1711.05101)."""

    lr: float = Field(gt=0, le=10, description="largest learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, ge=1e-30, le=1, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.1,
        ge=0,
        le=1e6,
        description="decay of weight matrices; norms, biases and expert and layer embeddings have none",
    )


class ScheduleConfig(Settings):
    """Learning-rate schedule."""

    name: Literal["cosine", "warmup_stable_decay", "linear", "constant"] = Field(
        "cosine", description="shape after the warm-up; `warmup_stable_decay` decays by a cosine"
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        le=LARGEST_COUNT,
        description="steps of linear warm-up: step `s` of them has `s / warmup_steps` of the largest rate",
    )
    decay_steps: int = Field(
        0, ge=0, le=LARGEST_COUNT, description="last steps of warmup_stable_decay, in which the rate falls"
    )
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="learning rate of the last step / largest; without effect on `constant`"
    )

    def factor(self, step: int, steps: int) -> float:
        """Return the learning rate of an optimizer step as a factor of the largest rate.

        With W warm-up steps, the factor is `step / W` until step W, 1 until step T, and then falls to `min_lr_ratio`
        at the last step. T is W, or the last step - `decay_steps` for `warmup_stable_decay`, but at least 1, so that
        the first rate is above 0.

        Args:
            step: optimizer step, counted from 1; after the last step the factor stays constant.
            steps: last step of the run.
        """
        step = min(step, steps)
        if step < self.warmup_steps:
            return step / self.warmup_steps
        decaying = self.decay_steps if self.name == "warmup_stable_decay" else steps - self.warmup_steps
        decay_start = max(steps - decaying, 1)
        if self.name == "constant" or step <= decay_start:
            return 1.0
        progress = (step - decay_start) / (steps - decay_start)
        remaining = 1 - progress if self.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * remaining


class EvaluationConfig(Settings):
    """When to validate, and on how much data."""

    interval: int = Field(
        1000, ge=1, le=LARGEST_COUNT, description="steps between two validations; the last step is validated too"
    )
    max_samples: int | None = Field(
        None,
        ge=1,
        le=LARGEST_COUNT,
        description="sequences to validate on, of each dataset in proportion to its length, but at least one; "
        "null takes all of them",
    )
    hyper_expert_contribution: bool = Field(
        True, description="validate a second time with the HyperExperts switched off, to log what they contribute"
    )
    prompts: list[str] = Field([], description="prompts that each validation continues greedily and logs")
    prompt_tokens: int = Field(32, ge=1, le=LARGEST_COUNT, description="tokens to generate for each prompt")
