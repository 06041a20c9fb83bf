"""How a rank finds out which other is lost, from the signs of life alone."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from hypermoe_ds.monitor.signs import SignOfLife
from hypermoe_ds.training.watchdog import Watchdog


def test_a_process_that_still_ends_while_it_is_looked_at_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:

        def die(_seconds: float) -> None:
            os.kill(process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        SignOfLife(1, socket.gethostname(), process.pid, 3, "here", passed=7, beats=1).write(tmp_path)
        watchdog = Watchdog(tmp_path, rank=0, ranks=2, timeout=2)
        watchdog._beat()
        monkeypatch.setattr("hypermoe_ds.training.watchdog.time.sleep", die)
        assert watchdog._findings().startswith(f"rank 1 (process {process.pid} on {socket.gethostname()}) died, last ")
