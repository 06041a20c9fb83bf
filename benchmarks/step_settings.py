"""Settings of a comparison of training steps, shared by train_step.py and the rank processes."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from hypermoe_ds.modeling import HyperMoEConfig


@dataclass(frozen=True)
class StepSettings:
    """Settings of one comparison.

    Attributes:
        preset: name of the preset.
        overrides: `key=value` overrides of the preset.
        model: the resulting fields of HyperMoEConfig.
        micro_batch_size: sequences per micro-batch on each rank.
        largest_micro_batch_size: upper limit of the search for the largest `micro_batch_size` that fits into memory.
        precision: "fp32" or "bf16".
        sequence_length: tokens per sequence.
        expert_parallel: ranks that share one copy of the experts.
        seed: seed of the weights and token ids.
        steps: measured steps of each side.
        warmup: warm-up steps of each side.
        threads: CPU threads per rank.
        repeat_batch: train on one batch, so that the loss decreases. If false, the learning rate is almost 0, because
            trained routers would balance the experts differently on each side.
        in_turns: number of rounds in which the compared models run one at a time, with only one in memory; 0 keeps
            all in memory.
        accumulation: micro-batches per step.
        activation_checkpointing: recompute layers in the backward pass.
        ranks: number of processes per side.
    """

    preset: str
    overrides: list[str]
    model: dict[str, Any]
    micro_batch_size: int
    largest_micro_batch_size: int
    precision: str
    sequence_length: int
    expert_parallel: int
    seed: int
    steps: int
    warmup: int
    threads: int
    repeat_batch: bool
    in_turns: int
    accumulation: int
    activation_checkpointing: bool
    ranks: int

    @classmethod
    def from_json(cls, text: str) -> "StepSettings":
        """Parse the output of `to_json`."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the settings as JSON, for the command line of a rank process."""
        return json.dumps(asdict(self))

    def model_config(self, side: str) -> HyperMoEConfig:
        """Return the configuration of one side's model."""
        return HyperMoEConfig(**{**self.model, "hypernetwork": side in ("hypermoe", "per_token")})

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step, over all ranks."""
        return self.ranks * self.accumulation * self.micro_batch_size * self.sequence_length
