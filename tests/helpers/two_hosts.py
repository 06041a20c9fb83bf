"""Simulate two hosts on one machine, to test launches over ssh.

Each host has its own network, PID, mount, UTS and IPC namespaces, with sshd as the first process. A host therefore has
its own hostname, /etc/hosts, /etc/ssh and /dev/shm, and sees only its own processes. The hosts share the disk, as with
NFS. A virtual Ethernet link connects the two hosts, and they have no other network.
"""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from tests.helpers.jobs import REPOSITORY, CompletedRun
from tests.helpers.ranks import CPU

NAMES = ("left", "right")
_ADDRESSES = {"left": "10.213.7.1", "right": "10.213.7.2"}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NEEDED = ("sshd", "ssh", "ip", "unshare")
_PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ip": "iproute2",
    "unshare": "util-linux",
    "mpirun": "openmpi-bin",
}
_UNSHARE = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
_UP_SECONDS = 20

_CLIENT = """
    Host *
      IdentityFile {ssh}/key
      IdentitiesOnly yes
      StrictHostKeyChecking no
      UserKnownHostsFile /dev/null
      LogLevel ERROR
    """
_SERVER = """
    HostKey {ssh}/host_key
    AuthorizedKeysFile {ssh}/key.pub
    PermitRootLogin prohibit-password
    PasswordAuthentication no
    StrictModes no
    UsePAM no
    PidFile none
    MaxStartups 100
    SetEnv PATH={path}
    """
# Boot script of a host. Finally, sshd replaces it as PID 1, so the kernel kills the host's processes when sshd ends.
_BOOT = """
    set -e
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /dev/shm
    mount --bind {folder}/hosts /etc/hosts
    mount --bind {folder}/ssh /etc/ssh
    mkdir -p /run/sshd
    hostname {name}
    exec {sshd} -D -e -f {folder}/ssh/sshd_config
    """


def unsupported_reason(*commands: str) -> str | None:
    """Return why this machine cannot simulate two hosts or run the given commands on them, or None if it can."""
    if os.geteuid() != 0:
        return "needs root to create namespaces"
    missing = [name for name in (*_NEEDED, *commands) if shutil.which(name, path=_search_path()) is None]
    if missing:
        packages = [_PACKAGES.get(name, name) for name in missing]
        return f"needs {', '.join(missing)}: apt-get install {' '.join(packages)}"
    namespace = f"hm{os.getpid()}try"
    steps = [
        ["ip", "netns", "add", namespace],
        ["ip", "-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"],
        ["ip", "netns", "exec", namespace, *_UNSHARE, "mount", "-t", "proc", "proc", "/proc"],
    ]
    try:
        for step in steps:
            tried = subprocess.run(step, capture_output=True, text=True, check=False)
            if tried.returncode:
                return f"cannot create namespaces: {tried.stderr.strip() or shlex.join(step)}"
    finally:
        _remove(namespace)
    return None


@dataclass(frozen=True)
class TwoHosts:
    """Two simulated hosts, `left` and `right`.

    Attributes:
        folder: folder with the configuration of both hosts.
        namespaces: network namespace of each host.
        processes: first process of each host; when it ends, the kernel kills all other processes of the host.
    """

    folder: Path
    namespaces: Mapping[str, str]
    processes: dict[str, "subprocess.Popen[bytes]"]

    def run(self, host: str, *words: object, folder: Path, seconds: int = 120, **environment: str) -> CompletedRun:
        """Run a command on a host over ssh, with this checkout's environment and extra environment variables."""
        process = self.start(host, *words, folder=folder, out=subprocess.PIPE, errors=subprocess.PIPE, **environment)
        try:
            out, errors = process.communicate(timeout=seconds)
        finally:
            process.kill()
        return CompletedRun(process.returncode, out, errors)

    def start(
        self, host: str, *words: object, folder: Path, out: int | IO[str], errors: int | IO[str], **environment: str
    ) -> "subprocess.Popen[str]":
        """Start a command as `run` does, but do not wait. The stdout goes to `out`, and the stderr to `errors`."""
        user = {
            **CPU,
            "PATH": f"{Path(sys.executable).parent}:{_PATH}",
            "PYTHONPATH": str(REPOSITORY),
            "HYPERMOE_VENV": sys.prefix,
        }
        variables = [f"{name}={value}" for name, value in {**user, **environment}.items()]
        line = shlex.join(["env", *variables, *map(str, words)])
        return subprocess.Popen(
            [*self._ssh(host), f"cd {shlex.quote(str(folder))} && exec {line}"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=errors, text=True,
        )  # fmt: skip

    def crash(self, host: str) -> None:
        """Simulate a power failure: disconnect the host, so that its killed processes close no connection."""
        self.disconnect(host)
        self.processes[host].kill()
        self.processes[host].wait()

    def disconnect(self, host: str) -> None:
        """Disconnect the host from the network."""
        _ip("-n", self.namespaces[host], "link", "set", "eth0", "down")

    def reconnect(self, host: str) -> None:
        """Reconnect the host to the network."""
        _ip("-n", self.namespaces[host], "link", "set", "eth0", "up")

    def _ssh(self, host: str) -> list[str]:
        inside = ["ip", "netns", "exec", self.namespaces[host]]
        return [*inside, "ssh", "-F", str(self.folder / "ssh" / "ssh_config"), _ADDRESSES[host]]

    def answers(self, host: str) -> bool:
        """Return whether an ssh login to the host succeeds."""
        login = subprocess.run(
            [*self._ssh(host), "true"], capture_output=True, timeout=_UP_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
        return login.returncode == 0


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Boot both hosts and connect them. On exit, remove their processes and namespaces.

    Args:
        folder: path of the folder to create for the configuration of both hosts.
    """
    hosts = TwoHosts(folder, {name: f"hm{os.getpid()}{name}" for name in NAMES}, {})
    with ExitStack() as stack:
        _write_configuration(folder)
        for namespace in hosts.namespaces.values():
            stack.callback(_remove, namespace)
            _ip("netns", "add", namespace)
        left, right = hosts.namespaces.values()
        _ip("-n", left, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", right)
        for name, namespace in hosts.namespaces.items():
            _ip("-n", namespace, "address", "add", f"{_ADDRESSES[name]}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", namespace, "link", "set", link, "up")
            hosts.processes[name] = stack.enter_context(_booted(folder, name, namespace))
        _await(hosts)
        yield hosts


def _write_configuration(folder: Path) -> None:
    ssh = folder / "ssh"
    ssh.mkdir(parents=True)
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / key], check=True)
    # Each host mounts this folder as its /etc/ssh.
    for name, text in (("ssh_config", _CLIENT), ("sshd_config", _SERVER)):
        (ssh / name).write_text(textwrap.dedent(text).format(ssh=ssh, path=_PATH))
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in _ADDRESSES.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")


@contextmanager
def _booted(folder: Path, name: str, namespace: str) -> Iterator["subprocess.Popen[bytes]"]:
    sshd = shutil.which("sshd", path=_search_path())
    script = textwrap.dedent(_BOOT).format(folder=shlex.quote(str(folder)), name=name, sshd=sshd)
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *_UNSHARE, "bash", "-c", script],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _await(hosts: TwoHosts) -> None:
    for name in NAMES:
        end = time.monotonic() + _UP_SECONDS
        while not hosts.answers(name):
            if time.monotonic() > end:
                raise RuntimeError(
                    f"host {name} did not start in {_UP_SECONDS} s: {(hosts.folder / f'{name}.log').read_text()}"
                )
            time.sleep(0.05)


def _remove(namespace: str) -> None:
    """Kill the processes in a network namespace, then delete the namespace and its network link."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    processes = []
    for number in listed.stdout.split():
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(number)))
            processes[-1].kill()
    psutil.wait_procs(processes, timeout=_UP_SECONDS)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _search_path() -> str:
    return f"{os.environ['PATH']}{os.pathsep}{_PATH}"
