"""Settings of the checkpoints."""

from typing import Literal

from pydantic import Field

from hypermoe_ds.checkpoint.manifest import Verify
from hypermoe_ds.config import LARGEST_COUNT, Settings


class CheckpointConfig(Settings):
    """When checkpoints are written and which are kept."""

    interval: int = Field(
        1000, ge=1, le=LARGEST_COUNT, description="steps between two checkpoints; one more is written at the end"
    )
    keep_last: int = Field(2, ge=1, le=LARGEST_COUNT, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        None, ge=1, le=LARGEST_COUNT, description="steps whose multiples are kept for good; null keeps none"
    )
    resume: Literal["auto", "none"] = Field("auto", description="continue from the newest checkpoint, if there is one")
    verify: Verify = Field(
        "full", description="compared with the manifest at a resume: sizes and headers, or full (hashes too, no NaN)"
    )
    asynchronous: bool = Field(
        True, description="write while training continues, from a copy in host memory (12 bytes a parameter of a rank)"
    )
