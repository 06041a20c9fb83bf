"""Where the ranks meet, and what is built on them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
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


def test_a_port_that_is_taken_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"^port {port} of 127.0.0.1: .*--master_port"):
            start_ranks()


def wait_alone() -> str:
    with pytest.raises(MachineError) as error:
        start_ranks(timeout=2)
    return str(error.value)


def test_ranks_that_do_not_come_are_waited_for_no_longer_than_allowed() -> None:
    with process_group(2) as environments:
        port = environments[0]["MASTER_PORT"]
        [told] = run_in_processes(environments[:1], wait_alone)
    assert told.startswith(f"port {port} of 127.0.0.1: the ranks cannot connect to it (")
    assert told.endswith("; see which host is missing: python tools/preflight.py")


def memory_added_by_products(row_counts: range) -> float:
    """MiB; a rank's resident memory after one bf16 product for each number of rows."""
    weight = torch.ones(768, 64, dtype=torch.bfloat16)
    before = psutil.Process().memory_info().rss
    for rows in row_counts:
        torch.ones(rows, 768, dtype=torch.bfloat16) @ weight
    return float(psutil.Process().memory_info().rss - before) / 2**20


def test_experts_whose_rows_are_others_in_every_step_do_not_fill_the_memory() -> None:
    few, many = (run_on_ranks(1, memory_added_by_products, range(64, end))[0] for end in (264, 1064))
    assert many < few + 40, "but 0.6 MiB each where the code for 1,024 is kept"


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


def test_a_rank_hears_of_the_end_of_its_launcher() -> None:
    launcher = subprocess.Popen(["sh", "-c", '"$0" -c "$1" & wait', sys.executable, ORPHAN], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    assert launcher.stdout.read(6) == b"ready "
    launcher.kill()
    assert launcher.stdout.read() == b"saved", "and the pipe is closed: nothing runs on"


MPIRUN = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}
SRUN = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def joined() -> tuple[int, int, str]:
    return *start_ranks(), os.environ["LOCAL_RANK"]


@pytest.mark.parametrize("theirs", [MPIRUN, SRUN], ids=["mpirun", "srun"])
def test_the_ranks_of_another_launcher_join_one_group(theirs: dict[str, str]) -> None:
    with process_group(2) as usual:
        environments = [{theirs.get(name, name): value for name, value in one.items()} for one in usual]
        assert run_in_processes(environments, joined) == [(0, 2, "0"), (1, 2, "1")]


def test_a_launcher_inside_an_allocation_is_believed_before_the_allocation() -> None:
    """As where `deepspeed` or `torchrun` is started by a Slurm job's script."""
    outside = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    with process_group(2) as usual:
        assert run_in_processes([outside | one for one in usual], joined) == [(0, 2, "0"), (1, 2, "1")]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", *MPIRUN, *MPIRUN.values(), *SRUN.values()):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_launcher")
def test_ranks_that_mpi_does_not_see_are_told_rather_than_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    monkeypatch.setattr(engine.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with pytest.raises(UserError, match=r"^mpi4py: finds 1 of the 8 ranks of the launcher; set MASTER_ADDR"):
        start_ranks()


@pytest.mark.usefixtures("no_launcher")
def test_without_mpi4py_the_way_to_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        UserError, match=r"^mpi4py: is needed to find the ranks, .*; bash launch/setup\.sh mpi, or set MASTER_ADDR"
    ):
        start_ranks()


def built_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that DeepSpeed is given."""
    given: list[Any] = []

    def initialize(model: Any, **_: Any) -> tuple[None]:
        given.append(model)
        return (None,)

    monkeypatch.setattr(engine.deepspeed, "initialize", initialize)
    config = HyperMoEConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=2
    )
    train = TrainConfig(steps=1, micro_batch_size=1, global_batch_size=1, precision="fp32")
    build_engine(config, {}, OptimizerConfig(lr=1e-3), ScheduleConfig(), train, ParallelConfig())
    return given[0]


@pytest.mark.parametrize(("gpu", "installed"), [(True, True), (True, False), (False, True)])
def test_liger_computes_the_loss_where_there_are_both_it_and_a_gpu(
    gpu: bool, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def liger_fused_linear_cross_entropy(
        input: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ce_weight: Any = None,
        ignore_index: int = -100, reduction: str = "mean", accum_dtype: Any = None,
    ) -> Tensor:  # fmt: skip
        calls.append(accum_dtype)
        return F.cross_entropy(F.linear(input, weight), target, ignore_index=ignore_index, reduction=reduction)

    stand_in: Any = ModuleType("liger_kernel.transformers.functional")
    stand_in.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel") if installed else None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    model = built_model(monkeypatch)

    ids = torch.arange(10).view(2, 5)
    seen = model(input_ids=ids, labels=ids, output_logits=False).lm_loss
    assert calls == [torch.float32] * (gpu and installed)
    assert seen.item() == pytest.approx(model(input_ids=ids, labels=ids).lm_loss.item(), rel=1e-6)


def test_an_operator_that_is_not_compiled_yet_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hypermoe_ds")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    _announce_compilation("cpu_adam", "Adam")
    assert [line.split(":")[0] for line in caplog.messages] == ["compiling Adam, once for this environment"]
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/cpu_adam.so").touch()
    _announce_compilation("cpu_adam", "Adam")
    assert len(caplog.messages) == 1
