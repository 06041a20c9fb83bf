"""The hosts of a job: from a hostfile or from Slurm, and how a command is run on one of them."""

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypermoe_ds.errors import UserError

_NAME = r"[A-Za-z0-9_:][A-Za-z0-9_.:@-]*"  # nothing that ssh, pdsh or a shell would read as an option or a pattern
_LINE = re.compile(rf"({_NAME})\s+slots=([1-9][0-9]*)\s*(#.*)?$")
_SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_HERE = "localhost"


@dataclass(frozen=True)
class Host:
    """One machine of a job.

    Attributes:
        name: as ssh or Slurm takes it.
        slots: ranks that run on it.
        reach: how it is reached: "ssh", "srun", or "here" for this machine itself.
    """

    name: str
    slots: int
    reach: str = "ssh"

    def command(self, script: str) -> list[str]:
        """The arguments that run a line of shell on this host."""
        if self.reach == "here":
            return ["bash", "-c", script]
        if self.reach == "srun":
            alone = ["--nodes=1", "--ntasks=1", f"--nodelist={self.name}", "--overlap", "--mpi=none", "--export=ALL"]
            return ["srun", *alone, "bash", "-c", script]
        options = shlex.split(os.environ.get("HYPERMOE_SSH_OPTIONS", _SSH_OPTIONS))
        return ["ssh", *options, self.name, f"exec bash -c {shlex.quote(script)}"]  # whatever the login shell is

    def reach_remedy(self) -> str:
        """What to try where this host does not answer."""
        if self.reach == "srun":
            return "see `sinfo` for its state and exclude it: sbatch --exclude"
        words = " ".join(filter(None, ("ssh", os.environ.get("HYPERMOE_SSH_OPTIONS"), self.name, "true")))
        return f"make `{words}` work without a password, or take it out of the hostfile"


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file of `host slots=RANKS` lines.

    Raises:
        UserError: it is missing, or a line is not of that form.
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
            raise UserError(f"{path}:{number}", f"'{line}' is no host", "write 'host slots=RANKS'")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}", f"names {match[1]} again", "give each host one line with all its slots")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise UserError(str(path), "names no host", "write 'host slots=RANKS'")
    return list(hosts.values())


def slurm_hosts(environment: Mapping[str, str]) -> list[Host]:
    """The hosts of the Slurm job that this process belongs to.

    Raises:
        UserError: it belongs to none.
    """
    try:
        nodes, tasks = environment["SLURM_JOB_NODELIST"], environment["SLURM_NTASKS_PER_NODE"]
    except KeyError as missing:
        remedy = "run it in a job of `sbatch --ntasks-per-node`, or give --hostfile"
        raise UserError(str(missing), "is not set", remedy) from None
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise UserError(f"SLURM_JOB_NODELIST={nodes}", shown.stderr.strip(), "see why scontrol fails")
    return [Host(name, int(tasks), "srun") for name in shown.stdout.split()]


def this_host(slots: str, gpus: int) -> list[Host]:
    """This machine alone.

    Args:
        slots: number of ranks; "gpu" or "auto" is one for each GPU.
        gpus: how many it has.

    Raises:
        UserError: `slots` is neither.
    """
    if slots in {"gpu", "auto"}:
        return [Host(_HERE, max(1, gpus), "here")]
    if not slots.isdecimal() or int(slots) == 0:
        raise UserError(f"slots={slots}", "is no number of ranks", "give a number, or gpu for one on each GPU")
    return [Host(_HERE, int(slots), "here")]


def rendezvous(hosts: Sequence[Host], environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which ranks of these hosts meet: those of the job, but on one host alone a free port.

    There other hosts of the job may already knock at the job's port.

    Raises:
        UserError: MASTER_PORT is no number, or MASTER_ADDR no host.
    """
    if hosts[0].reach == "here":
        with socket.create_server(("127.0.0.1", 0)) as free:
            return "127.0.0.1", free.getsockname()[1]
    port = environment.get("MASTER_PORT", "29500")
    if not port.isdecimal():
        raise UserError(f"MASTER_PORT={port}", "is no number", "set it to a free port")
    address = environment.get("MASTER_ADDR", hosts[0].name)
    if not re.fullmatch(_NAME, address):
        raise UserError(f"MASTER_ADDR={address}", "is no host", "set it to a name or an address")
    return address, int(port)


def forwarded_environment(patterns: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that every host must have, as the launch scripts pass them on.

    Args:
        patterns: a file of a regular expression a line.
        environment: what is set here.
    """
    expression = "|".join(patterns.read_text(encoding="utf-8").splitlines())
    return {name: value for name, value in sorted(environment.items()) if value and re.search(expression, name)}


def read_environment(path: Path) -> dict[str, str]:
    """Variables of a file of `NAME=VALUE` lines, which DeepSpeed calls `.deepspeed_env`.

    Raises:
        UserError: it cannot be read, or a line has no name.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give a file of NAME=VALUE lines") from None
    for number, line in enumerate(lines, start=1):
        if not re.match(r"[A-Za-z_][A-Za-z_0-9]*=", line):
            remedy = "write NAME=VALUE, one a line and no empty line: DeepSpeed takes nothing else"
            raise UserError(f"{path}:{number}", f"'{line}' is no variable", remedy)
    return dict(line.split("=", maxsplit=1) for line in lines)


def shell_line(command: list[str], environment: Mapping[str, str], folder: Path) -> str:
    """A line of bash that runs `command` in `folder` with these variables set, until it or the line's stdin ends.

    ssh closes that on the host when it ends here, however it does.
    """
    variables = [f"{name}={value}" for name, value in environment.items()]
    run = f"cd {shlex.quote(str(folder))} && exec {shlex.join(['env', *variables, *command])}"
    watch = "cat <&3; kill $command"
    return (  # `jobs -rp`: the watch may have ended long before the command, and its number gone to another process
        f"exec 3<&0; ({run}) </dev/null 3<&- & command=$!; ({watch}) >/dev/null 2>&1 & "
        "wait $command; code=$?; kill $(jobs -rp) 2>/dev/null; exit $code"
    )
