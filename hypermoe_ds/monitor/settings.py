"""Settings of the logs."""

from importlib.util import find_spec

from pydantic import Field

from hypermoe_ds.config import LARGEST_COUNT, Settings
from hypermoe_ds.errors import UserError


class MonitorConfig(Settings):
    """What is logged, and how often."""

    interval: int = Field(10, ge=1, le=LARGEST_COUNT, description="steps between two log lines")
    tensorboard: bool = Field(True, description="write RUN_DIR/tensorboard")
    wandb_project: str | None = Field(None, description="Weights & Biases project; null does not log there")
    csv: bool = Field(False, description="write RUN_DIR/csv")

    def check_installed(self) -> None:
        """Refuse to log to Weights & Biases without its package.

        Raises:
            UserError: it is not installed.
        """
        if self.wandb_project is not None and find_spec("wandb") is None:
            where = f"monitor.wandb_project={self.wandb_project}"
            raise UserError(where, "the package wandb is not installed", "pip install wandb, or leave this setting out")
