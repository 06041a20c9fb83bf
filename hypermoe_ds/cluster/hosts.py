"""Find the hosts of a job, in a hostfile or from Slurm, and run commands on them."""

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypermoe_ds.errors import UserError

_NAME = r"[A-Za-z0-9_:][A-Za-z0-9_.:@-]*"  # must not look like an option or a pattern to ssh, pdsh or a shell
_LINE = re.compile(rf"({_NAME})\s+slots=([1-9][0-9]*)\s*(#.*)?$")
_SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_HERE = "localhost"


@dataclass(frozen=True)
class Host:
    """One machine of a job.

    Attributes:
        name: name that ssh or Slurm uses for the host.
        slots: number of ranks on the host.
        reach: how to run commands on the host: "ssh", "srun", or "here" for this machine.
    """

    name: str
    slots: int
    reach: str = "ssh"

    def command(self, script: str) -> list[str]:
        """Return the command that runs a line of bash on this host."""
        if self.reach == "here":
            return ["bash", "-c", script]
        if self.reach == "srun":
            alone = ["--nodes=1", "--ntasks=1", f"--nodelist={self.name}", "--overlap", "--mpi=none", "--export=ALL"]
            return ["srun", *alone, "bash", "-c", script]
        options = shlex.split(os.environ.get("HYPERMOE_SSH_OPTIONS", _SSH_OPTIONS))
        return ["ssh", *options, self.name, f"exec bash -c {shlex.quote(script)}"]  # works with any login shell

    def reach_remedy(self) -> str:
        """Return a remedy for the case that this host does not answer."""
        if self.reach == "srun":
            return "see `sinfo` for its state, or exclude it with sbatch --exclude"
        words = " ".join(filter(None, ("ssh", os.environ.get("HYPERMOE_SSH_OPTIONS"), self.name, "true")))
        return f"make `{words}` work without a password, or remove the host from the hostfile"


def read_hostfile(path: Path) -> list[Host]:
    """Read a file of `host slots=RANKS` lines.

    Raises:
        UserError: the file cannot be read, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "start from launch/hostfile.example") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise UserError(f"{path}:{number}", f"'{line}' is not a host", "write 'host slots=RANKS'")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}", f"names {match[1]} again", "give each host one line with all its slots")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise UserError(str(path), "names no host", "write 'host slots=RANKS'")
    return list(hosts.values())


def slurm_hosts(environment: Mapping[str, str]) -> list[Host]:
    """Return the hosts of the Slurm job that this process belongs to.

    Raises:
        UserError: this process does not belong to a Slurm job.
    """
    try:
        nodes, tasks = environment["SLURM_JOB_NODELIST"], environment["SLURM_NTASKS_PER_NODE"]
    except KeyError as missing:
        remedy = "run this command in a job of `sbatch --ntasks-per-node`, or give --hostfile"
        raise UserError(str(missing), "is not set", remedy) from None
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise UserError(f"SLURM_JOB_NODELIST={nodes}", shown.stderr.strip(), "see why scontrol fails")
    return [Host(name, int(tasks), "srun") for name in shown.stdout.split()]


def this_host(slots: str, gpus: int) -> list[Host]:
    """Return this machine as the only host.

    Args:
        slots: number of ranks; "gpu" or "auto" means one per GPU.
        gpus: number of GPUs.

    Raises:
        UserError: `slots` is not a positive number, "gpu" or "auto".
    """
    if slots in {"gpu", "auto"}:
        return [Host(_HERE, max(1, gpus), "here")]
    if not slots.isdecimal() or int(slots) == 0:
        raise UserError(f"slots={slots}", "is not a number of ranks", "give a number, or gpu for one per GPU")
    return [Host(_HERE, int(slots), "here")]


def rendezvous(hosts: Sequence[Host], environment: Mapping[str, str]) -> tuple[str, int]:
    """Return the address and port of the rendezvous.

    If this machine is the only host, return any free port. Otherwise return the job's port without testing whether it
    is free, because other hosts may already be connecting to it.

    Raises:
        UserError: MASTER_PORT is not a number, or MASTER_ADDR is not a host.
    """
    if hosts[0].reach == "here":
        with socket.create_server(("127.0.0.1", 0)) as free:
            return "127.0.0.1", free.getsockname()[1]
    port = environment.get("MASTER_PORT", "29500")
    if not port.isdecimal():
        raise UserError(f"MASTER_PORT={port}", "is not a number", "set it to a free port")
    address = environment.get("MASTER_ADDR", hosts[0].name)
    if not re.fullmatch(_NAME, address):
        raise UserError(f"MASTER_ADDR={address}", "is not a host", "set it to a name or an address")
    return address, int(port)


def forwarded_environment(patterns: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that the launch scripts forward to every host.

    Args:
        patterns: file with one regular expression per line.
        environment: the environment of this process.
    """
    expression = "|".join(patterns.read_text(encoding="utf-8").splitlines())
    return {name: value for name, value in sorted(environment.items()) if value and re.search(expression, name)}


def read_environment(path: Path) -> dict[str, str]:
    """Read variables from a file of `NAME=VALUE` lines, such as DeepSpeed's `.deepspeed_env`.

    Raises:
        UserError: the file cannot be read, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give a file of NAME=VALUE lines") from None
    for number, line in enumerate(lines, start=1):
        if not re.match(r"[A-Za-z_][A-Za-z_0-9]*=", line):
            remedy = "write one NAME=VALUE per line without empty lines, as DeepSpeed expects"
            raise UserError(f"{path}:{number}", f"'{line}' is not a variable", remedy)
    return dict(line.split("=", maxsplit=1) for line in lines)


def shell_line(command: list[str], environment: Mapping[str, str], folder: Path) -> str:
    """Return a line of bash that runs `command` in `folder` with these environment variables.

    The line kills the command when stdin is closed, which happens when the local ssh process ends.
    """
    variables = [f"{name}={value}" for name, value in environment.items()]
    run = f"cd {shlex.quote(str(folder))} && exec {shlex.join(['env', *variables, *command])}"
    watch = "cat <&3; kill $command"
    return (  # not a saved process ID but `jobs -rp`: the watch may have ended, and another process may have its ID
        f"exec 3<&0; ({run}) </dev/null 3<&- & command=$!; ({watch}) >/dev/null 2>&1 & "
        "wait $command; code=$?; kill $(jobs -rp) 2>/dev/null; exit $code"
    )
