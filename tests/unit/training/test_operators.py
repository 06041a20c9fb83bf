"""Test that stale locks of compiled operators do not block a launch."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from hypermoe_ds.training.operators import operators_folder, without_stale_locks

OPERATOR = "deepspeed_shm_comm"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the lock of an operator whose loading process was killed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / OPERATOR / "lock"
    lock.parent.mkdir()
    lock.touch()
    return lock


def test_stale_lock_is_removed_before_an_operator_is_loaded(lock: Path) -> None:
    with without_stale_locks():
        assert not lock.exists()


def test_lock_of_a_loading_process_is_kept(lock: Path) -> None:
    exists = []

    def load_too() -> None:
        with without_stale_locks():
            exists.append(lock.exists())

    other = Thread(target=load_too)
    with without_stale_locks():
        lock.touch()  # torch creates this lock while it loads the operator
        other.start()
        other.join(timeout=0.5)
        assert lock.exists()
        assert exists == []
        lock.unlink()
    other.join()
    assert exists == [False]


def test_two_processes_can_load_at_the_same_time(lock: Path) -> None:
    with without_stale_locks(), without_stale_locks():
        assert not lock.exists()


@pytest.mark.skipif(os.environ.get("DS_ACCELERATOR") != "cpu", reason="a GPU's process groups load no such operator")
def test_launch_does_not_wait_for_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    shutil.copytree(operators_folder_of_this_environment() / OPERATOR, tmp_path / OPERATOR)
    (tmp_path / OPERATOR / "lock").touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    subprocess.run(
        [sys.executable, "-c", "from hypermoe_ds.training.engine import start_ranks; start_ranks(60)"],
        env={**os.environ, **ranks, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        check=True,
        timeout=600,
    )


def operators_folder_of_this_environment() -> Path:
    return operators_folder() if "TORCH_EXTENSIONS_DIR" in os.environ else Path(sys.prefix) / "torch_extensions"
