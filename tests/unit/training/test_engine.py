"""Test the rendezvous of the ranks and the engine."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hypermoe_ds.errors import MachineError, UserError
from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.training import engine
from hypermoe_ds.training.engine import _announce_compilation, build_engine, start_ranks
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig
from tests.helpers.ranks import process_group, run_in_processes, run_on_ranks


def test_used_port_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environment = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"^port {port} of 127.0.0.1: .*--master_port"):
            start_ranks()


def wait_alone() -> str:
    with pytest.raises(MachineError) as error:
        start_ranks(timeout=2)
    return str(error.value)


def test_waiting_for_missing_ranks_ends_after_the_timeout() -> None:
    with process_group(2) as environments:
        port = environments[0]["MASTER_PORT"]
        [message] = run_in_processes(environments[:1], wait_alone)
    assert message.startswith(f"port {port} of 127.0.0.1: the ranks cannot connect to it (")
    assert message.endswith("; see which host is missing: python tools/preflight.py")


def memory_added_by_products(row_counts: range) -> float:
    """Return by how many MiB resident memory grows after bf16 products, one for each number of rows."""
    weight = torch.ones(768, 64, dtype=torch.bfloat16)
    before = psutil.Process().memory_info().rss
    for rows in row_counts:
        torch.ones(rows, 768, dtype=torch.bfloat16) @ weight
    return float(psutil.Process().memory_info().rss - before) / 2**20


def test_memory_does_not_grow_with_the_number_of_expert_batch_sizes() -> None:
    few, many = (run_on_ranks(1, memory_added_by_products, range(64, end))[0] for end in (264, 1064))
    assert many < few + 40, "with 1,024 cached kernels, memory would grow by 0.6 MiB per shape"


ORPHAN = """
import os, signal, sys, time
from hypermoe_ds.data.loader import signal_when_parent_ends
def save(number, frame):
    os.write(1, b"saved")
    os._exit(75)
signal.signal(signal.SIGTERM, save)
signal_when_parent_ends(signal.SIGTERM)
os.write(1, b"ready ")
time.sleep(1000)
"""


def test_rank_receives_a_signal_when_its_launcher_ends() -> None:
    launcher = subprocess.Popen(["sh", "-c", '"$0" -c "$1" & wait', sys.executable, ORPHAN], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    assert launcher.stdout.read(6) == b"ready "
    launcher.kill()
    assert launcher.stdout.read() == b"saved", "the rank must save and exit, which closes the pipe"


MPIRUN = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}
SRUN = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def joined() -> tuple[int, int, str]:
    return *start_ranks(), os.environ["LOCAL_RANK"]


@pytest.mark.parametrize("variable_names", [MPIRUN, SRUN], ids=["mpirun", "srun"])
def test_ranks_of_mpirun_and_srun_join_one_group(variable_names: dict[str, str]) -> None:
    with process_group(2) as usual:
        environments = [
            {variable_names.get(name, name): value for name, value in variables.items()} for variables in usual
        ]
        assert run_in_processes(environments, joined) == [(0, 2, "0"), (1, 2, "1")]


def test_launcher_variables_take_precedence_over_slurm_variables() -> None:
    """Test the variables that `deepspeed` or `torchrun` sets when a Slurm job's script starts the launcher."""
    outside = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    with process_group(2) as usual:
        assert run_in_processes([outside | variables for variables in usual], joined) == [(0, 2, "0"), (1, 2, "1")]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", *MPIRUN, *MPIRUN.values(), *SRUN.values()):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the variable after the test
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_launcher")
def test_ranks_that_mpi_does_not_find_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    monkeypatch.setattr(engine.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with pytest.raises(UserError, match=r"^mpi4py: finds only 1 of the launcher's 8 ranks; set MASTER_ADDR"):
        start_ranks()


@pytest.mark.usefixtures("no_launcher")
def test_missing_mpi4py_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        UserError, match=r"^mpi4py: is needed to find the ranks, .*; bash launch/setup\.sh mpi, or set MASTER_ADDR"
    ):
        start_ranks()


def built_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the model that `build_engine` passes to DeepSpeed."""
    models: list[Any] = []

    def initialize(model: Any, **_: Any) -> tuple[SimpleNamespace]:
        models.append(model)
        return (SimpleNamespace(optimizer=None),)

    monkeypatch.setattr(engine.deepspeed, "initialize", initialize)
    config = HyperMoEConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=2
    )
    train = TrainConfig(steps=1, micro_batch_size=1, global_batch_size=1, precision="fp32")
    build_engine(config, {}, OptimizerConfig(lr=1e-3), ScheduleConfig(), train, ParallelConfig())
    return models[0]


@pytest.mark.parametrize(("gpu", "installed"), [(True, True), (True, False), (False, True)])
def test_liger_computes_the_loss_if_installed_and_on_a_gpu(
    gpu: bool, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def liger_fused_linear_cross_entropy(
        input: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ce_weight: Any = None,
        ignore_index: int = -100, reduction: str = "mean", accum_dtype: Any = None,
    ) -> Tensor:  # fmt: skip
        calls.append(accum_dtype)
        return F.cross_entropy(F.linear(input, weight), target, ignore_index=ignore_index, reduction=reduction)

    fake: Any = ModuleType("liger_kernel.transformers.functional")
    fake.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel") if installed else None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake if installed else None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    model = built_model(monkeypatch)

    ids = torch.arange(10).view(2, 5)
    loss = model(input_ids=ids, labels=ids, output_logits=False).lm_loss
    assert calls == [torch.float32] * (gpu and installed)
    assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).lm_loss.item(), rel=1e-6)


def test_compilation_of_an_operator_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hypermoe_ds")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    _announce_compilation("cpu_adam", "Adam")
    assert [line.split(":")[0] for line in caplog.messages] == [f"compiling Adam in {tmp_path}"]
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/cpu_adam.so").touch()
    _announce_compilation("cpu_adam", "Adam")
    assert len(caplog.messages) == 1
