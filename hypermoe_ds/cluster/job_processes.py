"""The processes of a job, wherever they run and whoever started them."""

import secrets
import signal
import subprocess
import time
from collections.abc import Sequence

from hypermoe_ds.cluster.hosts import Host

_VARIABLE = "HYPERMOE_JOB"  # the launch scripts hand it on to other hosts
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")  # one of them makes a process of the job a rank
_SECONDS_TO_DIE = 10
_SECONDS_TO_ANSWER = 60
# /proc/PID/environ is what a process was started with. A rank and its loaders have the launcher's number of it.
# A list of processes is old when its end is reached: each is looked at again in the moment before it is signalled.
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
gone_within() {
    left=$1
    while [ -n "$(job)" ]; do
        if [ $left -le 0 ]; then return 1; fi
        left=$((left - 1))
        sleep 1
    done
}
"""


class JobProcesses:
    """All processes that carry this job's name in their environment, on this machine and other hosts.

    Args:
        hosts: other hosts that may have some.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._name = secrets.token_hex(8)
        self._hosts = [Host("localhost", 1, "here"), *hosts]

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process and its children some of the job."""
        return {_VARIABLE: self._name}

    def signal_ranks(self, number: signal.Signals) -> bool:
        """Send a signal to all ranks; tells whether there are any."""
        name = number.name.removeprefix("SIG")
        answer = self._everywhere(f'found=$(ranks); signal {name} $found; echo "ranks:" $found', _SECONDS_TO_ANSWER)
        return any(text.rpartition("ranks:")[2].strip() for text in answer)

    def end(self, seconds: int) -> None:
        """End all of them: ranks may save and end by themselves for so many seconds, then nothing runs on.

        Hosts that do not answer are left alone.
        """
        kill = f"gone_within {seconds} || signal KILL $(job); gone_within {_SECONDS_TO_DIE}"
        self._everywhere(f"signal TERM $(ranks); {kill}", seconds + _SECONDS_TO_DIE + _SECONDS_TO_ANSWER)

    def _everywhere(self, script: str, seconds: int) -> list[str]:
        """What a line of shell prints on each host, run on all at once."""
        line = f"name={_VARIABLE}={self._name}; rank='^({'|'.join(RANK_VARIABLES)})='{_FUNCTIONS}{script}"
        end = time.monotonic() + seconds
        nowhere, pipe = subprocess.DEVNULL, subprocess.PIPE
        started = [
            subprocess.Popen(host.command(line), text=True, stdin=nowhere, stdout=pipe, stderr=nowhere)
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
