"""Settings of a training run that the YAML recipe owns."""

from typing import Annotated, Literal

from pydantic import Field

from hypermoe_ds.config import Settings

Stretch = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class TrainConfig(Settings):
    """Length, batch and precision of a run."""

    steps: int = Field(ge=1, description="length of the run in optimizer steps; the schedule spans it")
    stop_at_step: int | None = Field(None, ge=1, description="save and end this start after that step")
    micro_batch_size: int = Field(ge=1, description="sequences of one forward pass on one rank")
    global_batch_size: int = Field(ge=1, description="sequences of one optimizer step over all ranks")
    seed: int = Field(1234, ge=0, description="seed of the initial weights and of the order of the data")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="precision of weights and activations")
    clip_grad_norm: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 does not clip")
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")
    collective_timeout: float = Field(
        1800, gt=0, description="seconds without progress of this rank after which a lost or hanging rank ends the job"
    )
    max_bad_steps: int = Field(
        20, ge=0, description="steps in a row that are skipped for a NaN or Inf in loss or gradient; one more stops"
    )
    skip_samples: list[Stretch] = Field(
        [], description="`[[first, last], ...]`, places in the order of the training samples that are left out"
    )
    consistency_interval: int | None = Field(
        1000, ge=1, description="steps between two comparisons of the ranks' copies of parameters; null never compares"
    )


class OptimizerConfig(Settings):
    """AdamW (arXiv 1711.05101)."""

    lr: float = Field(gt=0, description="largest learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.1, ge=0, description="decay of weight matrices; norms, biases and expert and layer embeddings have none"
    )


class ScheduleConfig(Settings):
    """Learning rate over the steps, by `transformers.get_scheduler`."""

    name: Literal["cosine", "warmup_stable_decay", "linear", "constant"] = Field(
        "cosine", description="shape after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    decay_steps: int = Field(0, ge=0, description="last steps of warmup_stable_decay, in which the rate falls")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="last learning rate / largest, for cosine and warmup_stable_decay"
    )


class EvaluationConfig(Settings):
    """When the model is validated, and on how much."""

    interval: int = Field(1000, ge=1, description="steps between two validations; one more comes at the end")
    max_samples: int | None = Field(
        None, ge=1, description="validate on the first so many sequences; null takes all of them"
    )
