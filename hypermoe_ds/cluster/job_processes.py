"""Find, signal and end all processes of a job on this machine and on other hosts."""

import secrets
import signal
import subprocess
import time
from collections.abc import Sequence

from hypermoe_ds.cluster.hosts import Host

_VARIABLE = "HYPERMOE_JOB"  # the launch scripts forward this variable to other hosts
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")  # set only in the environment of ranks
_SECONDS_TO_DIE = 10
_SECONDS_TO_ANSWER = 60
# /proc/PID/environ is the environment that a process was started with. The function `ranks` also lists data loader
# processes, which inherit the rank variables. Process IDs may be reused, so the function `signal` checks each process
# again before it sends a signal.
_FUNCTIONS = """
job() { grep -lzsx "$name" /proc/[0-9]*/environ | cut -d/ -f3; }
ranks() {
    for process in $(job); do
        if grep -qzsE "$rank" /proc/$process/environ; then echo $process; fi
    done
}
signal() {
    number=$1
    shift
    for process; do
        if grep -qzsx "$name" /proc/$process/environ; then kill -s $number $process 2>/dev/null; fi
    done
}
ended_within() {
    left=$1
    while [ -n "$(job)" ]; do
        if [ $left -le 0 ]; then return 1; fi
        left=$((left - 1))
        sleep 1
    done
}
"""


class JobProcesses:
    """All processes with this job's name in their environment, on this machine and on other hosts.

    Args:
        hosts: other hosts that may run processes of the job.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._name = secrets.token_hex(8)
        self._hosts = [Host("localhost", 1, "here"), *hosts]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that mark a process and its children as part of the job."""
        return {_VARIABLE: self._name}

    def signal_ranks(self, number: signal.Signals) -> bool:
        """Send a signal to all ranks and return whether any rank was found."""
        name = number.name.removeprefix("SIG")
        answer = self._everywhere(f'found=$(ranks); signal {name} $found; echo "ranks:" $found', _SECONDS_TO_ANSWER)
        return any(text.rpartition("ranks:")[2].strip() for text in answer)

    def end(self, seconds: int) -> None:
        """Ask all ranks to save and exit, and kill the job's processes that are still running after `seconds`.

        Hosts that do not answer are skipped.
        """
        kill = f"ended_within {seconds} || signal KILL $(job); ended_within {_SECONDS_TO_DIE}"
        self._everywhere(f"signal TERM $(ranks); {kill}", seconds + _SECONDS_TO_DIE + _SECONDS_TO_ANSWER)

    def _everywhere(self, script: str, seconds: int) -> list[str]:
        """Run a line of shell on all hosts in parallel and return the output of each host."""
        line = f"name={_VARIABLE}={self._name}; rank='^({'|'.join(RANK_VARIABLES)})='{_FUNCTIONS}{script}"
        end = time.monotonic() + seconds
        closed, pipe = subprocess.DEVNULL, subprocess.PIPE
        started = [
            subprocess.Popen(host.command(line), text=True, stdin=closed, stdout=pipe, stderr=closed)
            for host in self._hosts
        ]
        printed = []
        for process in started:
            try:
                printed.append(process.communicate(timeout=max(0, end - time.monotonic()))[0].strip())
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        return printed
