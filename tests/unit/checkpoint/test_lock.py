"""A process locks a run folder until it ends."""

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from hypermoe_ds.checkpoint.lock import RunLock
from hypermoe_ds.errors import UserError


def hold(folder: Path, sender: Connection, until: Connection) -> None:
    lock = RunLock(folder)
    child = multiprocessing.get_context("fork").Process(target=until.recv)  # like a data loader worker
    child.start()
    sender.send((os.getpid(), child.pid))
    until.recv()
    del lock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    ends, until = context.Pipe()
    holder = context.Process(target=hold, args=(tmp_path / "run", sender, until))
    holder.start()
    pid, child = receiver.recv()
    try:
        with pytest.raises(UserError) as refused:
            RunLock(tmp_path / "run")
        assert str(refused.value) == (
            f"run.dir={tmp_path / 'run'}: process {pid} on {socket.gethostname()} is training in it; "
            "end that job or choose another run.dir"
        )
        holder.kill()
        holder.join()
        os.kill(child, 0)  # the child of the killed process continues
        lock = RunLock(tmp_path / "run")
        del lock
        assert (tmp_path / "run" / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    finally:
        holder.kill()
        os.kill(child, 9)
        ends.close()


def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run.dir=.*file/run: cannot be written \(.*\); choose another run.dir$"):
        RunLock(tmp_path / "file" / "run")
