"""The training state that each checkpoint stores."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hypermoe_ds.checkpoint.manifest import Count
from hypermoe_ds.data.stage_start import StageStart
from hypermoe_ds.errors import UserError


@dataclass
class TrainState:
    """Progress of a run, saved with each checkpoint.

    Attributes:
        step: optimizer steps taken.
        consumed_samples: index of the next sample in the data order; skipped samples count as consumed.
        data_stage: where the current stage of the data began; None in a new run and in checkpoints of version 0.1.0.
        bad_steps: number of bad steps in a row, up to the last step. A bad step is skipped because of NaN or Inf.
        good_samples: `consumed_samples` before the first of these bad steps.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    step: Count = 0
    consumed_samples: Count = 0
    data_stage: StageStart | None = None
    bad_steps: Count = 0
    good_samples: Count = 0

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainState":
        """Validate and return the state read from a checkpoint; for an empty dict, return the state of a new run.

        Checkpoints of version 0.1.0 contain a hash of their data order, which later versions cannot continue.

        Raises:
            UserError: a key is unknown or a value is invalid.
        """
        try:
            known = {key: value for key, value in saved.items() if key != "data_order"}
            return _STATE.validate_python({"good_samples": saved.get("consumed_samples", 0)} | known)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = f"state.run.{'.'.join(map(str, first['loc']))} of the checkpoint"
            raise UserError(where, first["msg"], "choose another checkpoint") from None

    def advance(self, next_sample: int, skipped: bool = False) -> None:
        """Count one optimizer step, taken or skipped, and set the index of the next sample."""
        self.step += 1
        self.consumed_samples = next_sample
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if not skipped:
            self.good_samples = next_sample

    def to_dict(self) -> dict[str, Any]:
        """Return the state as a dict for a checkpoint."""
        return asdict(self)


_STATE = TypeAdapter(TrainState)
