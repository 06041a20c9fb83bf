"""Where a run's numbers go: the console, metrics.jsonl and DeepSpeed's monitor (TensorBoard, W&B, CSV)."""

import json
import math
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from torch import Tensor

from hypermoe_ds.errors import MachineError
from hypermoe_ds.monitor.files import write_whole
from hypermoe_ds.monitor.settings import MonitorConfig
from hypermoe_ds.monitor.summary import read_records


class MetricsFile:
    """RUN_DIR/metrics.jsonl: one JSON object a record.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def drop_after(self, step: int) -> None:
        """Remove records of steps that a resumed run will take again."""
        if not self.path.exists():
            return
        kept = [record for record in read_records(self.path) if record["step"] <= step]
        write_whole(self.path, "".join(f"{json.dumps(record)}\n" for record in kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record, flushed; JSON has no NaN and no infinity, they become null."""
        finite = {key: None if _is_not_finite(value) else value for key, value in record.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Sinks:
    """All of them, written to by rank 0 only."""

    def __init__(self, config: MonitorConfig, run_dir: Path, rank: int, resumed_step: int) -> None:
        self._monitor = MonitorMaster(get_monitor_config(_monitor_sections(config, run_dir)))
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._speaks = rank == 0
        if self._speaks:
            self._metrics.drop_after(resumed_step)

    def say(self, line: str) -> None:
        """One line on the console; nowhere where its other end is gone, as with a launcher that was killed."""
        if not self._speaks:
            return
        try:
            print(line, flush=True)
        except OSError:  # the run goes on, or saves and ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def write(self, step: int, scalars: Mapping[str, float], load_MN: Tensor | None = None) -> None:
        """One record at `step`: numbers and, per MoE layer, the share of the routed rows of each expert.

        Raises:
            MachineError: the disk is full or gone.
        """
        if not self._speaks:
            return
        try:
            self._write(step, scalars, load_MN)
        except OSError as error:
            raise MachineError(f"{self._metrics.path}: cannot be written ({error.strerror})") from None

    def _write(self, step: int, scalars: Mapping[str, float], load_MN: Tensor | None) -> None:
        loads = {
            f"expert_load/moe_layer_{layer}": load_N for layer, load_N in enumerate(() if load_MN is None else load_MN)
        }
        self._metrics.append({"step": step, **scalars, **{name: load_N.tolist() for name, load_N in loads.items()}})
        if self._monitor.tb_monitor is not None:
            for name, load_N in loads.items():  # before the scalars, whose writing flushes both
                self._monitor.tb_monitor.summary_writer.add_histogram(name, load_N, step)
        self._monitor.write_events([(_group(name), value, step) for name, value in scalars.items()])


def _group(name: str) -> str:
    """TensorBoard shows what stands before the slash as one group."""
    return name if "/" in name else f"{'valid' if name.startswith('valid_') else 'train'}/{name}"


def _monitor_sections(config: MonitorConfig, run_dir: Path) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "tensorboard": {"enabled": config.tensorboard, "output_path": str(run_dir), "job_name": "tensorboard"},
        "csv_monitor": {"enabled": config.csv, "output_path": str(run_dir), "job_name": "csv"},
    }
    if config.wandb_project:
        sections["wandb"] = {"enabled": True, "project": config.wandb_project}
    return sections


def step_line(step: int, steps: int, scalars: Mapping[str, float], seconds_left: float, load_MN: Tensor) -> str:
    """The console's line of one logged step."""
    parts = [
        f"step {step}/{steps}",
        f"loss {scalars['loss']:.4f}",
        f"lr {scalars['lr']:.2e}",
        f"grad norm {scalars['grad_norm']:.3f}",
        f"{scalars['tokens_per_second']:,.0f} tokens/s",
        f"{timedelta(seconds=round(seconds_left))} left",
    ]
    if load_MN.numel():
        parts.append(f"expert load {float(load_MN.min()):.1%} to {float(load_MN.max()):.1%}")
    return " | ".join(parts)
