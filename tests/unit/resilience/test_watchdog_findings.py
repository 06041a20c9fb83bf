import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from hypermoe_ds.resilience.heartbeat import Heartbeat
from hypermoe_ds.resilience.watchdog import _END_WITH_REPORT, Watchdog, start_time


def test_a_process_that_dies_during_the_check_is_reported_as_dead(
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


# This script replaces `sleep` and `kill`: the process ends during the grace period, and `kill` prints its arguments.
ENDS_IN_TIME = """
command sleep 1000 & process=$!
sleep() { command kill -KILL $process; wait $process; } 2>/dev/null
kill() { echo "$@"; }
set -- $process $(sed 's/.*) //' /proc/$process/stat | cut -d ' ' -f 20) .
"""


def test_the_id_of_a_process_that_already_ended_is_not_killed() -> None:
    script = ENDS_IN_TIME + _END_WITH_REPORT
    assert subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=False, timeout=60).stdout == b""


def test_a_process_with_another_start_time_is_not_killed(tmp_path: Path) -> None:
    (tmp_path / "verdict").touch()
    with subprocess.Popen(["sleep", "1000"]) as other:
        command = ["sh", "-c", _END_WITH_REPORT, "sh", str(other.pid), start_time() + "0", str(tmp_path / "verdict")]
        subprocess.run(command, check=False, timeout=5)
        assert other.poll() is None
        other.kill()
