"""How a rank finds out which other is lost, from the signs of life alone."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from hypermoe_ds.resilience.heartbeat import Heartbeat
from hypermoe_ds.resilience.watchdog import _END_WITH_REPORT, Watchdog, start_time


def test_a_process_that_still_ends_while_it_is_looked_at_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:

        def die(_seconds: float) -> None:
            os.kill(process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        Heartbeat(1, socket.gethostname(), process.pid, 3, "here", passed=7, beats=1).write(tmp_path)
        watchdog = Watchdog(tmp_path, rank=0, ranks=2, timeout=2)
        watchdog._beat()
        monkeypatch.setattr("hypermoe_ds.resilience.watchdog.time.sleep", die)
        assert watchdog._find_lost_ranks().startswith(
            f"rank 1 (process {process.pid} on {socket.gethostname()}) died, last "
        )


# A process that ends in the seconds before it would be killed; what would be killed then is printed.
ENDS_IN_TIME = """
command sleep 1000 & process=$!
sleep() { command kill -KILL $process; wait $process; } 2>/dev/null
kill() { echo "$@"; }
set -- $process $(sed 's/.*) //' /proc/$process/stat | cut -d ' ' -f 20) .
"""


def test_a_process_that_ended_before_it_was_killed_leaves_its_number_to_others() -> None:
    script = ENDS_IN_TIME + _END_WITH_REPORT
    assert subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=False, timeout=60).stdout == b""


def test_a_process_that_began_at_another_time_is_not_ended(tmp_path: Path) -> None:
    (tmp_path / "verdict").touch()
    with subprocess.Popen(["sleep", "1000"]) as other:
        words = ["sh", "-c", _END_WITH_REPORT, "sh", str(other.pid), start_time() + "0", str(tmp_path / "verdict")]
        subprocess.run(words, check=False, timeout=5)
        assert other.poll() is None
        other.kill()
