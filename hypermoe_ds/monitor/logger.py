"""Write metrics, settings and samples to all configured destinations."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from hypermoe_ds.errors import UserError, disk_errors
from hypermoe_ds.monitor.csv_tables import CsvTable
from hypermoe_ds.monitor.record_file import RecordFile
from hypermoe_ds.monitor.settings import MonitorConfig
from hypermoe_ds.monitor.tensorboard import TensorBoard
from hypermoe_ds.monitor.weights_and_biases import WeightsAndBiases

_VALIDATION_KEY = "valid_loss"  # every validation record contains this key
_LOAD_DIGITS = 5


class MetricLogger:
    """Log on rank 0 to metrics.jsonl and samples.jsonl, and to TensorBoard, CSV and Weights & Biases if configured.

    Args:
        config: selects the destinations.
        run_dir: the run folder.
        rank: this rank; only rank 0 writes.
        resumed_step: step of the checkpoint that the run continues from; records of later steps are removed.

    Raises:
        UserError: the logs of an earlier launch cannot be read or written.
    """

    def __init__(self, config: MonitorConfig, run_dir: Path, rank: int, resumed_step: int) -> None:
        self._writes = rank == 0
        self._run_dir = run_dir
        self._resumed_step = resumed_step
        self._metrics = RecordFile(run_dir / "metrics.jsonl")
        self._samples = RecordFile(run_dir / "samples.jsonl")
        self._tensorboard: TensorBoard | None = None
        self._tables: dict[bool, CsvTable] = {}
        self._wandb: WeightsAndBiases | None = None
        if not self._writes:
            return
        try:
            self._open(config)
        except OSError as error:
            where, problem = str(error.filename or run_dir), f"cannot be read or written ({error.strerror})"
            raise UserError(where, problem, "move it or make it writable") from None
        if config.wandb_project is not None:
            self._wandb = WeightsAndBiases(config.wandb_project, run_dir)

    def _open(self, config: MonitorConfig) -> None:
        for records in (self._metrics, self._samples):
            records.drop_after(self._resumed_step)
        if config.tensorboard:
            name = self._run_dir.resolve().name
            self._tensorboard = TensorBoard(self._run_dir / "tensorboard", name, self._resumed_step)
        if config.csv:
            folder = self._run_dir / "csv"
            folder.mkdir(parents=True, exist_ok=True)
            self._tables = {False: CsvTable(folder / "train.csv"), True: CsvTable(folder / "validation.csv")}
            for table in self._tables.values():
                table.drop_after(self._resumed_step)

    def log(self, step: int, values: Mapping[str, float], load_MN: Tensor | None = None) -> None:
        """Log one record of a step.

        Args:
            step: optimizer step, counted from 1.
            values: values by the keys of `hypermoe_ds.monitor.metrics`; the Unix time is added as `time`.
            load_MN: share of each MoE layer's routed rows that each expert received.

        Raises:
            MachineError: the disk is full or fails.
        """
        if not self._writes:
            return
        record, loads = {"step": step, "time": round(time.time(), 3), **values}, _load_lists(load_MN)
        with disk_errors(self._metrics.path):
            self._metrics.append({**record, **loads})
            if self._tensorboard is not None:
                self._tensorboard.scalars(step, values)
                if load_MN is not None and load_MN.numel():
                    self._tensorboard.loads(step, load_MN)
                self._tensorboard.flush()
            if self._tables:
                self._tables[_VALIDATION_KEY in values].append(record)
        if self._wandb is not None:
            self._wandb.metrics(step, values, loads)

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Log prompts and the model's continuations.

        Raises:
            MachineError: the disk is full or fails.
        """
        if not self._writes or not samples:
            return
        with disk_errors(self._metrics.path):
            for prompt, text in samples:
                self._samples.append({"step": step, "prompt": prompt, "text": text})
            if self._tensorboard is not None:
                self._tensorboard.samples(step, samples)
                self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.samples(step, samples)

    def log_launch(self, settings: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Log the resolved recipe, git commit and package versions of this launch.

        Raises:
            MachineError: the disk is full or fails.
        """
        if not self._writes:
            return
        if self._tensorboard is not None:
            blocks = {"recipe": settings, "versions": versions}
            texts = {name: _yaml_block(block) for name, block in blocks.items()}
            with disk_errors(self._metrics.path):
                self._tensorboard.texts(self._resumed_step, texts)
                self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.settings({**settings, "versions": dict(versions)})


def _load_lists(load_MN: Tensor | None) -> dict[str, list[float]]:
    loads = [] if load_MN is None else load_MN.tolist()
    rounded = [[round(load, _LOAD_DIGITS) for load in row] for row in loads]
    return {f"expert_load/moe_layer_{layer}": row for layer, row in enumerate(rounded)}


def _yaml_block(values: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(values), sort_keys=False)}```"
