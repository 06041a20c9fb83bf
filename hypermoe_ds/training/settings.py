"""Settings of the sections `train`, `optimizer`, `schedule` and `evaluation`."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hypermoe_ds.config import LARGEST_COUNT, Settings


def integral_to_int(value: Any) -> Any:
    """Convert a float without a fractional part, such as 300e9 in YAML, to an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


SampleRange = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_COUNT**2)]], Field(min_length=2, max_length=2)]


class TrainConfig(Settings):
    """Length, batch and precision of a run."""

    steps: int = Field(
        ge=1,
        le=LARGEST_COUNT,
        description="length of the run and of its schedule in optimizer steps, unless `train.tokens` is set",
    )
    tokens: Annotated[int | None, BeforeValidator(integral_to_int)] = Field(
        None,
        ge=1,
        le=LARGEST_COUNT**3,
        description="length of the run in tokens, such as 300e9, instead of `train.steps`; rounded up to whole steps",
    )
    stop_at_step: int | None = Field(
        None, ge=1, le=LARGEST_COUNT, description="step after which this launch saves a checkpoint and ends"
    )
    micro_batch_size: int = Field(ge=1, le=LARGEST_COUNT, description="sequences per forward pass on each rank")
    global_batch_size: int = Field(ge=1, le=LARGEST_COUNT, description="sequences per optimizer step, over all ranks")
    seed: int = Field(1234, ge=0, lt=2**32, description="seed for the initial weights and the data order")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="precision of weights and activations")
    clip_grad_norm: float = Field(1.0, ge=0, le=1e6, description="maximum gradient norm; 0 disables clipping")
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")
    collective_timeout: float = Field(
        1800,
        ge=1,
        le=30 * 24 * 3600,
        description="seconds without progress after which a rank reports a lost or hanging rank and ends the job",
    )
    max_bad_steps: int = Field(
        20,
        ge=0,
        le=LARGEST_COUNT,
        description="maximum number of consecutive steps skipped because of NaN or Inf in the loss or gradient",
    )
    skip_samples: list[SampleRange] = Field(
        [], description="ranges of training samples to skip: `[[first, last], ...]`, as indices in the data order"
    )
    consistency_interval: int | None = Field(
        1000,
        ge=1,
        le=LARGEST_COUNT,
        description="steps between checks that replicated parameters are equal on all ranks; null disables the checks",
    )


class OptimizerConfig(Settings):
    """Settings of AdamW (arXiv 1711.05101)."""

    lr: float = Field(gt=0, le=10, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay rate of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay rate of the second moment")
    eps: float = Field(1e-8, ge=1e-30, le=1, description="term added to the denominator for numerical stability")
    weight_decay: float = Field(
        0.1,
        ge=0,
        le=1e6,
        description="weight decay of matrices; norms, biases, and expert and layer embeddings are not decayed",
    )


class ScheduleConfig(Settings):
    """Settings of the learning-rate schedule."""

    name: Literal["cosine", "warmup_stable_decay", "linear", "constant"] = Field(
        "cosine", description="schedule after the warm-up; `warmup_stable_decay` uses a cosine decay"
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        le=LARGEST_COUNT,
        description="number of linear warm-up steps: step `s` uses `s / warmup_steps` of the peak learning rate",
    )
    decay_steps: int = Field(
        0, ge=0, le=LARGEST_COUNT, description="number of decay steps at the end of `warmup_stable_decay`"
    )
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="final learning rate as a fraction of the peak; ignored by `constant`"
    )

    def factor(self, step: int, steps: int) -> float:
        """Return the learning rate of an optimizer step as a fraction of the peak learning rate.

        With W warm-up steps, the factor is `step / W` until step W, 1 until step T, and then falls to `min_lr_ratio`
        at the last step. T is the last step minus `decay_steps` for `warmup_stable_decay`, and W for other schedules.
        T is at least 1, so that the first learning rate is above 0.

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
    """Settings of the section `evaluation`."""

    interval: int = Field(
        1000, ge=1, le=LARGEST_COUNT, description="steps between validations; the last step is also validated"
    )
    max_samples: int | None = Field(
        None,
        ge=1,
        le=LARGEST_COUNT,
        description="number of validation sequences, split among the datasets in proportion to their lengths (at "
        "least one per dataset); null uses all sequences",
    )
    hyper_expert_contribution: bool = Field(
        True, description="also validate without HyperExperts, to log their contribution to the loss"
    )
    prompts: list[str] = Field([], description="prompts to continue greedily and log at each validation")
    prompt_tokens: int = Field(32, ge=1, le=LARGEST_COUNT, description="tokens to generate for each prompt")
