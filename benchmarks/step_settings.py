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
        overrides: `key=value` changes of the preset.
        model: the resulting fields of HyperMoEConfig.
        micro_batch_size: sequences of a micro-batch on each rank.
        largest_micro_batch_size: the largest value that `micro_batch_size` may take while it is searched for.
        precision: "fp32" or "bf16".
        sequence_length: tokens of a sequence.
        expert_parallel: ranks that share one copy of the experts.
        seed: seed of the weights and of the token ids.
        steps: measured steps of each side.
        warmup: steps before the measured ones.
        threads: CPU threads of a rank.
        repeat_batch: train on one batch, so that the loss falls. Otherwise the learning rate is almost 0: routers that
            learn would balance the experts differently on each side.
        in_turns: rounds in which one side at a time is in memory; 0 keeps all sides in memory.
        accumulation: micro-batches of a step.
        activation_checkpointing: recompute layers in the backward pass.
        ranks: processes of each side.
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
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the settings as a JSON object, the argument of a rank process."""
        return json.dumps(asdict(self))

    def model_config(self, side: str) -> HyperMoEConfig:
        """Return the configuration of one side's model."""
        return HyperMoEConfig(**{**self.model, "hypernetwork": side in ("hypermoe", "per_token")})

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all ranks."""
        return self.ranks * self.accumulation * self.micro_batch_size * self.sequence_length
