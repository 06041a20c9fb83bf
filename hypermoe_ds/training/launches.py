"""Write RUN_DIR/launches.jsonl, with one entry when a launch starts and one when it ends."""

import json
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hypermoe_ds.data.shares import DatasetShare
from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import disk_errors
from hypermoe_ds.provenance import versions_now

Ended = Literal["finished", "stop_at_step", "signal"]


def device_name() -> str:
    """Return the name of this rank's GPU, or "cpu"."""
    return torch.cuda.get_device_name() if uses_gpu() else "cpu"


@dataclass(frozen=True)
class Launch:
    """A launch of a run.

    Attributes:
        step: step at which the launch starts.
        world_size: number of ranks.
        hosts: number of hosts.
        parameters: numbers of parameters: total, active and hypernetwork.
        datasets: share of each training dataset; empty on all ranks except rank 0.
        device: name of rank 0's GPU, or "cpu".
    """

    step: int
    world_size: int
    hosts: int
    parameters: Mapping[str, int]
    datasets: Sequence[DatasetShare]
    device: str = field(default_factory=device_name)

    def write(self, run_dir: Path) -> None:
        """Append the launch to RUN_DIR/launches.jsonl.

        Raises:
            MachineError: the file cannot be written.
        """
        versions = {"python": platform.python_version(), **versions_now()}
        commit = versions.pop("git_commit")
        entry = {
            "step": self.step,
            "world_size": self.world_size,
            "host": socket.gethostname(),
            "device": self.device,
            "commit": None if commit == "unknown" else commit,
            "versions": versions,
            "parameters": dict(self.parameters),
            "datasets": {
                dataset.name: {key: value for key, value in asdict(dataset).items() if key != "name"}
                for dataset in self.datasets
            },
        }
        _append(run_dir, entry)


def write_end(run_dir: Path, step: int, ended: Ended) -> None:
    """Append an entry to RUN_DIR/launches.jsonl with the step at which a launch ended and the reason.

    Raises:
        MachineError: the file cannot be written.
    """
    _append(run_dir, {"step": step, "ended": ended})


def _append(run_dir: Path, entry: Mapping[str, Any]) -> None:
    path = run_dir / "launches.jsonl"
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 3), **entry}) + "\n")
