"""Settings of the section `monitor`."""

from importlib.util import find_spec
from typing import Annotated

from pydantic import Field

from hypermoe_ds.config import LARGEST_COUNT, Settings
from hypermoe_ds.errors import UserError


class MonitorConfig(Settings):
    """What to log and how often."""

    interval: int = Field(10, ge=1, le=LARGEST_COUNT, description="steps between log lines")
    norms_interval: int | None = Field(
        100,
        ge=1,
        le=LARGEST_COUNT,
        description="steps between measurements of parameter norms, update norms and the similarity of generated "
        "weights; steps with a measurement are also logged; null disables the measurements",
    )
    tensorboard: bool = Field(True, description="write RUN_DIR/tensorboard")
    wandb_project: str | None = Field(None, description="Weights & Biases project; null disables Weights & Biases")
    csv: bool = Field(False, description="write RUN_DIR/csv/train.csv and RUN_DIR/csv/validation.csv")
    peak_tflops: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="peak TFLOP/s of one GPU in `train.precision`, used for `mfu`; null looks it up by GPU model",
    )
    profile_steps: list[Annotated[int, Field(ge=1, le=LARGEST_COUNT)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="first and last step to trace with the PyTorch profiler into RUN_DIR/profile, as `[first, last]`; "
        "null disables profiling",
    )
    profile_ranks: list[Annotated[int, Field(ge=0, le=LARGEST_COUNT)]] = Field([0], description="ranks to trace")
    memory_snapshot: bool = Field(False, description="also write a CUDA memory snapshot of the profiled steps")

    def check(self) -> None:
        """Check that the settings are consistent and that the needed packages are installed.

        Raises:
            UserError: Weights & Biases is not installed, or the profiled steps are missing or in the wrong order.
        """
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise UserError(f"monitor.profile_steps={self.profile_steps}", "ends before it begins", "give first, last")
        if self.memory_snapshot and self.profile_steps is None:
            remedy = "set monitor.profile_steps too"
            raise UserError("monitor.memory_snapshot=true", "needs profiled steps, but there are none", remedy)
        if self.wandb_project is not None and find_spec("wandb") is None:
            where = f"monitor.wandb_project={self.wandb_project}"
            raise UserError(where, "the package wandb is not installed", "pip install wandb, or remove this setting")
