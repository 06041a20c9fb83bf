"""Settings of the logs."""

from pydantic import Field

from hypermoe_ds.config import LARGEST_COUNT, Settings


class MonitorConfig(Settings):
    """What is logged, and how often."""

    interval: int = Field(10, ge=1, le=LARGEST_COUNT, description="steps between two log lines")
    tensorboard: bool = Field(True, description="write RUN_DIR/tensorboard")
    wandb_project: str | None = Field(None, description="Weights & Biases project; null does not log there")
    csv: bool = Field(False, description="write RUN_DIR/csv")
