"""Settings of the section `checkpoint`."""

from typing import Literal

from pydantic import Field

from hypermoe_ds.checkpoint.manifest import Verify
from hypermoe_ds.config import LARGEST_COUNT, Settings


class CheckpointConfig(Settings):
    """When to write checkpoints and which to keep."""

    interval: int = Field(
        1000, ge=1, le=LARGEST_COUNT, description="steps between two checkpoints; the last step is saved too"
    )
    keep_last: int = Field(2, ge=1, le=LARGEST_COUNT, description="number of newest checkpoints to keep")
    keep_every: int | None = Field(
        None,
        ge=1,
        le=LARGEST_COUNT,
        description="keep checkpoints at multiples of this many steps forever; null keeps none",
    )
    resume: Literal["auto", "none"] = Field("auto", description="continue from the newest checkpoint, if there is one")
    verify: Verify = Field(
        "full",
        description="checks at a resume: `sizes` compares sizes and headers, `full` also hashes, and refuses NaN",
    )
    asynchronous: bool = Field(
        True,
        description="write while training continues, from a copy in host memory (12 bytes per parameter of a rank)",
    )
