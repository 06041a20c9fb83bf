"""Settings of the section `checkpoint`."""

from typing import Literal

from pydantic import Field

from hypermoe_ds.checkpoint.manifest import Verify
from hypermoe_ds.config import LARGEST_COUNT, Settings


class CheckpointConfig(Settings):
    """When to save checkpoints, which to keep, and how to resume."""

    interval: int = Field(
        1000, ge=1, le=LARGEST_COUNT, description="steps between checkpoints; the last step is also saved"
    )
    keep_last: int = Field(2, ge=1, le=LARGEST_COUNT, description="number of most recent checkpoints to keep")
    keep_every: int | None = Field(
        None,
        ge=1,
        le=LARGEST_COUNT,
        description="also keep all checkpoints whose step is a multiple of this number; null keeps only the most "
        "recent ones",
    )
    resume: Literal["auto", "none"] = Field(
        "auto",
        description="`auto` resumes from the newest checkpoint, if any; `none` refuses a run that has checkpoints",
    )
    verify: Verify = Field(
        "full",
        description="how to verify a checkpoint before resuming from it: `sizes` compares file sizes and headers; "
        "`full` also compares hashes and refuses NaN",
    )
    asynchronous: bool = Field(
        True,
        description="write checkpoints in the background, from a copy in host memory (12 bytes per parameter owned by "
        "the rank)",
    )
