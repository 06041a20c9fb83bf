"""Report the state of one host of a job: `python -m hypermoe_ds.cluster.host_report QUERY` prints JSON.

`QUERY` is a JSON object with the fields of `HostQuery`. The clock is read last, just before the report is printed, so
that the querying machine can compare the clock with the arrival time.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hypermoe_ds.config import apply_overrides, load_yaml
from hypermoe_ds.errors import UserError
from hypermoe_ds.provenance import git_commit, package_version, source_digest

HOST_REPORT = "host report: "  # marks the JSON line, because the host's shell may print other lines


@dataclass(frozen=True)
class HostQuery:
    """Files and settings that a host checks for its report.

    Attributes:
        run_dir: the run folder.
        token: name of a file that the querying machine wrote to the run folder.
        config: path of the recipe.
        deepspeed_config: path of the DeepSpeed JSON.
        overrides: `section.key=value` arguments.
        data: paths of the token files and the tokenizer.
    """

    run_dir: str
    token: str
    config: str
    deepspeed_config: str
    overrides: Sequence[str]
    data: Sequence[str]


@dataclass(frozen=True)
class HostReport:
    """State of a host.

    Attributes:
        python: version of Python.
        torch: version of PyTorch.
        deepspeed: version of DeepSpeed.
        project: git commit and a digest of the source files.
        settings: digest of the recipe with overrides and the DeepSpeed JSON, or the reason why they cannot be read.
        data: digest of the sizes of the data files, or the first missing file.
        devices: name of each GPU; None if DS_ACCELERATOR selects the CPU.
        memory_gib: free space in /dev/shm, in GiB.
        disk_gib: free space on the disk of the run folder, in GiB.
        sees_run_folder: whether the token file exists.
        address: GLOO_SOCKET_IFNAME if it is set, otherwise the address that the host's own name resolves to.
        clock: time of the report in seconds since the epoch.
    """

    python: str
    torch: str
    deepspeed: str
    project: str
    settings: str
    data: str
    devices: Sequence[str] | None
    memory_gib: float
    disk_gib: float
    sees_run_folder: bool
    address: str
    clock: float


def report_host(query: HostQuery) -> HostReport:
    """Report the state of this host."""
    return HostReport(
        python=platform.python_version(),
        torch=package_version("torch"),
        deepspeed=package_version("deepspeed"),
        project=f"{git_commit()[:8]} {source_digest()}",
        settings=settings_digest(query.config, query.deepspeed_config, query.overrides),
        data=data_digest(query.data),
        devices=_devices(),
        memory_gib=_free_gib(Path("/dev/shm")),  # noqa: S108 (shared memory of the ranks)
        disk_gib=_free_gib(Path(query.run_dir)),
        sees_run_folder=(Path(query.run_dir) / query.token).exists(),
        address=_own_address(),
        clock=time.time(),
    )


def settings_digest(config: str, deepspeed_config: str, overrides: Sequence[str]) -> str:
    """Return a short digest of the settings on this host, independent of the files' formatting and comments."""
    try:
        recipe = apply_overrides(load_yaml(config), overrides)
        own = json.loads(Path(deepspeed_config).read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError) as error:
        return f"unreadable: {error}"
    return hashlib.sha256(json.dumps([recipe, own], sort_keys=True, default=str).encode()).hexdigest()[:8]


def data_digest(files: Sequence[str]) -> str:
    """Return a short digest of the file sizes; folders are only checked for existence."""
    sizes = []
    for file in map(Path, files):
        try:
            sizes.append(None if file.is_dir() else file.stat().st_size)
        except OSError:
            return f"lacks {file}"
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]


def _devices() -> list[str] | None:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    import torch  # noqa: PLC0415 (the import takes seconds)

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _free_gib(path: Path) -> float:
    """Return the free space at `path` or its nearest existing parent, in GiB."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30


def _own_address() -> str:
    try:
        return os.environ.get("GLOO_SOCKET_IFNAME") or socket.gethostbyname(socket.gethostname())
    except OSError:
        return "unknown"


if __name__ == "__main__":
    print(HOST_REPORT + json.dumps(asdict(report_host(HostQuery(**json.loads(sys.argv[1]))))), flush=True)
