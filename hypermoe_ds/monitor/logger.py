"""Write metrics to metrics.jsonl, TensorBoard, Weights & Biases and CSV files."""

import csv
import json
import math
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from hypermoe_ds.errors import MachineError, UserError
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


class CsvFiles:
    """RUN_DIR/csv: one file a metric, with the columns `step` and the metric's name.

    Args:
        folder: where they are; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def drop_after(self, step: int) -> None:
        """Remove rows of steps that a resumed run will take again, repeated headers and a row that was cut off."""
        for path in self._folder.glob("*.csv"):
            # Not by a CSV reader, which fails on damaged files: bytes of no encoding, fields of megabytes.
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            header, *rows = [line.split(",") for line in lines] or [[]]
            header = header if len(header) == 2 and header[0] == "step" else ["step", path.stem]
            kept = [row for row in rows if len(row) == 2 and row[0].isdecimal() and int(row[0]) <= step]
            write_whole(path, "".join(f"{','.join(row)}\r\n" for row in [header, *kept]))

    def append(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one row to the file of each metric."""
        for name, value in scalars.items():
            path = self._folder / f"{name.replace('/', '_')}.csv"
            header = [] if path.exists() else [("step", name.rpartition("/")[2])]
            with path.open("a", newline="") as file:
                csv.writer(file).writerows([*header, (step, value)])


class MetricLogger:
    """Write metrics to every destination that is switched on, on rank 0 only.

    Args:
        config: which destinations there are.
        run_dir: the run folder.
        rank: this rank.
        resumed_step: step of the checkpoint that the run continues from; what was logged after it is removed.

    Raises:
        UserError: what an earlier launch logged cannot be read or written.
    """

    def __init__(self, config: MonitorConfig, run_dir: Path, rank: int, resumed_step: int) -> None:
        self._writes = rank == 0
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._board: SummaryWriter | None = None
        self._tables: CsvFiles | None = None
        self._wandb: Any = None
        if not self._writes:
            return
        try:
            self._metrics.drop_after(resumed_step)
            if config.tensorboard:
                self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)
            if config.csv:
                self._tables = CsvFiles(run_dir / "csv")
                self._tables.drop_after(resumed_step)
        except OSError as error:
            where, problem = str(error.filename or run_dir), f"cannot be read or written ({error.strerror})"
            raise UserError(where, problem, "move it away, or make it writable") from None
        if config.wandb_project is not None:
            self._wandb = import_module("wandb").init(project=config.wandb_project)

    def log(self, step: int, values: Mapping[str, float], load_MN: Tensor | None = None) -> None:
        """Log one record of a step.

        Args:
            step: optimizer step, counted from 1.
            values: values by the keys of `hypermoe_ds.monitor.metrics`; the time of day is added as `time`.
            load_MN: share of each MoE layer's routed rows that each expert received.

        Raises:
            MachineError: the disk is full or gone.
        """
        if not self._writes:
            return
        try:
            self._write(step, {"time": round(time.time(), 3), **values}, load_MN)
        except OSError as error:
            raise MachineError(f"{self._metrics.path}: cannot be written ({error.strerror})") from None

    def _write(self, step: int, scalars: Mapping[str, float], load_MN: Tensor | None) -> None:
        loads = {
            f"expert_load/moe_layer_{layer}": load_N for layer, load_N in enumerate(() if load_MN is None else load_MN)
        }
        self._metrics.append({"step": step, **scalars, **{name: load_N.tolist() for name, load_N in loads.items()}})
        grouped = {_group(name): value for name, value in scalars.items()}
        if self._board is not None:
            for name, value in grouped.items():
                self._board.add_scalar(name, value, step)
            for name, load_N in loads.items():
                self._board.add_histogram(name, load_N, step)
            self._board.flush()
        if self._tables is not None:
            self._tables.append(step, grouped)
        if self._wandb is not None:
            self._wandb.log(grouped, step=step)


def _group(name: str) -> str:
    """TensorBoard shows what stands before the slash as one group."""
    return name if "/" in name else f"{'valid' if name.startswith('valid_') else 'train'}/{name}"
