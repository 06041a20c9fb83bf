"""Where a run stands."""

from dataclasses import asdict, dataclass


@dataclass
class TrainState:
    """Position of a run, saved with each checkpoint.

    Attributes:
        step: optimizer steps taken.
        consumed_samples: sequences drawn from the training data; fixes which come next.
    """

    step: int = 0
    consumed_samples: int = 0

    def advance(self, samples: int) -> None:
        """Count one optimizer step over `samples` sequences."""
        self.step += 1
        self.consumed_samples += samples

    def to_dict(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return asdict(self)
