"""Where a run stands."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Position of a run, saved with each checkpoint.

    Attributes:
        step: optimizer steps taken.
        consumed_samples: sequences drawn from the training data; fixes which come next.
        data_order: key of the order they are drawn in, "" before the first start.
    """

    step: int = 0
    consumed_samples: int = 0
    data_order: str = ""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainState":
        """Read it out of a checkpoint."""
        return cls(**saved)

    def advance(self, samples: int) -> None:
        """Count one optimizer step over `samples` sequences."""
        self.step += 1
        self.consumed_samples += samples

    def follow(self, data_order: str) -> bool:
        """Take up an order of the data; tells whether it is another one than before.

        Under another order samples already seen come again, and others never.
        """
        changed = self.data_order not in ("", data_order)
        self.data_order = data_order
        return changed

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return asdict(self)
