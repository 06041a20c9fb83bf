"""Check the hosts of a job before it starts.

The hosts must answer, have the same software, data and GPUs, share the run folder, and have a fast interconnect. Each
failed check is reported in one line with a remedy.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from threading import Timer
from typing import NamedTuple

from hypermoe_ds.cluster.host_report import HOST_REPORT, HostQuery, HostReport
from hypermoe_ds.cluster.hosts import Host, shell_line
from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.topology import hosts_that_fit, largest_expert_parallel

INTERCONNECT = "interconnect: "  # marks the JSON line of interconnect.py, because libraries print other lines
_ANSWER_SECONDS = 60
_MEASURE_SECONDS = 120
_RENDEZVOUS_SECONDS = 60
_SECONDS_AFTER_FAILURE = 5
_MEMORY_GIB = 0.125  # needed in /dev/shm per rank: 66 MB for DeepSpeed's shared-memory op, and more for NCCL
_CLOCK_SECONDS = 5.0
_SLOW_SHARE = 1 / 3  # fraction of the median bandwidth over all pairs
_ALIKE = {
    "python": "rebuild the environment there: bash launch/setup.sh",
    "torch": "run there: bash launch/setup.sh",
    "deepspeed": "run there: bash launch/setup.sh",
    "project": "check out the same commit there, without edits",
    "settings": "copy the same recipe and DeepSpeed JSON there",
    "data": "copy the token files and the tokenizer there, or to storage that all hosts mount",
    "devices": "list only hosts with the same GPUs in the hostfile",
}


@dataclass(frozen=True)
class HostAnswer:
    """A host's answer to the query.

    Attributes:
        host: the queried host.
        report: the host's report; None if the query failed.
        trouble: last line of output if the query failed.
        exit_code: exit code if the query failed; 126 and 127 mean that the shell could not start the command.
        clock_ahead: seconds by which the host's clock is ahead of this machine's clock.
    """

    host: Host
    report: HostReport | None
    trouble: str = ""
    exit_code: int | None = None
    clock_ahead: float = 0.0


@dataclass(frozen=True)
class Interconnect:
    """Measured bandwidth, in GB/s sent by each rank.

    Attributes:
        all_reduce: bandwidth of an all-reduce over all ranks; None if there is only one rank.
        all_to_all: bandwidth of an all-to-all over all ranks; None if there is only one rank.
        pairs: for each pair of hosts, the two indices and the bandwidth between the hosts' first ranks. These ranks
            send data to each other at the same time.
        wrong: collectives that returned a wrong result.
    """

    all_reduce: float | None
    all_to_all: float | None
    pairs: list[tuple[int, int, float]]
    wrong: list[str]


class Failure(NamedTuple):
    """A check that failed.

    Attributes:
        host: the host responsible for the failure; None if no single host is responsible.
        error: the error to report.
    """

    host: Host | None
    error: UserError


@dataclass(frozen=True)
class Starter:
    """Start Python modules on hosts, with the same interpreter and working directory on every host.

    Attributes:
        environment: environment variables for the module.
        folder: working directory.
    """

    environment: Mapping[str, str]
    folder: Path

    def start(self, host: Host, seconds: int, module: str, *arguments: str) -> subprocess.Popen[str]:
        """Start `python -m module arguments`. The process is killed after `seconds` or when its stdin closes."""
        command = ["timeout", "--kill-after=5", str(seconds), sys.executable, "-m", module, *arguments]
        return subprocess.Popen(
            host.command(shell_line(command, self.environment, self.folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ask_hosts(hosts: Sequence[Host], query: HostQuery, starter: Starter) -> list[HostAnswer]:
    """Query all hosts in parallel. If a host does not respond, its `HostAnswer` has no report."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(lambda host: _ask(host, query, starter), hosts))


def _ask(host: Host, query: HostQuery, starter: Starter) -> HostAnswer:
    try:
        process = starter.start(host, _ANSWER_SECONDS, "hypermoe_ds.cluster.host_report", json.dumps(asdict(query)))
    except OSError as error:
        return HostAnswer(host, None, str(error))
    last = "no answer"
    with process, _ended_after(process, _ANSWER_SECONDS + 10):
        for line in process.stdout or ():
            arrived = time.time()
            if line.startswith(HOST_REPORT):
                report = HostReport(**json.loads(line.removeprefix(HOST_REPORT)))
                return HostAnswer(host, report, clock_ahead=report.clock - arrived)
            last = line.strip() or last
    return HostAnswer(host, None, last, process.returncode)


@contextmanager
def _ended_after(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Kill the process if the code inside the context takes longer than `seconds`."""
    timer = Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_hosts(answers: Sequence[HostAnswer], query: HostQuery, disk_gib: float) -> list[Failure]:
    """Return all failed checks.

    Args:
        answers: answers of all hosts.
        query: the query that the hosts answered.
        disk_gib: free disk space that the run needs.
    """
    failures = [
        Failure(answer.host, UserError(answer.host.name, f"does not answer ({answer.trouble})", _remedy(answer)))
        for answer in answers
        if answer.report is None
    ]
    present = [(answer, answer.report) for answer in answers if answer.report is not None]
    for name, remedy in _ALIKE.items():
        failures += _differing(name, {answer.host: _shown(getattr(report, name)) for answer, report in present}, remedy)
    for answer, report in present:
        lacks = _lacking(answer, report, query, disk_gib)
        if len(answers) > 1 and report.address.startswith("127.") and report.devices is None:
            lacks.append(_unreachable_name(answer.host.name, report.address))
        failures += [Failure(answer.host, error) for error in lacks]
    return failures


def _remedy(answer: HostAnswer) -> str:
    if answer.exit_code in (126, 127):
        return "build the environment there, at the same path as here: bash launch/setup.sh"
    return answer.host.reach_remedy()


def _differing(name: str, values: Mapping[Host, str], remedy: str) -> list[Failure]:
    """Return a failure for each host whose value differs from the most common value."""
    [(usual, _)] = Counter(values.values()).most_common(1) or [("", 0)]
    failures = [
        Failure(host, UserError(f"{host.name}: {name}", f"{value}, but {usual} on most hosts", remedy))
        for host, value in values.items()
        if value != usual
    ]
    if usual.startswith(("unreadable", "lacks")):
        failures.append(Failure(None, UserError(name, usual, remedy)))
    return failures


def _lacking(answer: HostAnswer, report: HostReport, query: HostQuery, disk_gib: float) -> list[UserError]:
    """Return an error for each requirement that one host does not meet."""
    host, found = answer.host, []
    if report.devices is not None and len(report.devices) < host.slots:
        remedy = "lower its slots, or set DS_ACCELERATOR=cpu to train without GPUs"
        found.append(UserError(f"{host.name}: slots={host.slots}", f"the host has {len(report.devices)} GPUs", remedy))
    if report.memory_gib < host.slots * _MEMORY_GIB:
        need = f"{report.memory_gib:.2f} GiB are free, but {host.slots} ranks need {host.slots * _MEMORY_GIB:.2f} GiB"
        found.append(UserError(f"{host.name}: /dev/shm", need, "enlarge it (in a container: --shm-size) or clear it"))
    if report.disk_gib < disk_gib:
        need = f"{report.disk_gib:.2f} GiB are free, but checkpoints need {disk_gib:.2f} GiB"
        found.append(
            UserError(f"{host.name}: run.dir={query.run_dir}", need, "free space or lower checkpoint.keep_last")
        )
    if not report.sees_run_folder:
        problem = "is not the same folder as on this machine"
        remedy = "choose a folder on storage that all hosts mount"
        found.append(UserError(f"{host.name}: run.dir={query.run_dir}", problem, remedy))
    if abs(answer.clock_ahead) > _CLOCK_SECONDS:
        problem = f"differs by {answer.clock_ahead:+.0f} s from this machine's clock"
        found.append(UserError(f"{host.name}: clock", problem, "set it with NTP: timedatectl set-ntp true"))
    return found


def _unreachable_name(host: str, address: str) -> UserError:
    """Return the error for a host whose own name resolves to a loopback address. Gloo would send it to other hosts."""
    remedy = "set GLOO_SOCKET_IFNAME to the network interface, or correct /etc/hosts there"
    return UserError(f"{host}: its own name", f"resolves to {address}, which other hosts cannot reach", remedy)


def measure_interconnect(
    hosts: Sequence[Host], starter: Starter, address: str, port: int, mebibytes: int
) -> Interconnect:
    """Measure an all-reduce and an all-to-all over all ranks, and an exchange between each pair of hosts.

    Args:
        hosts: all hosts.
        starter: starts the processes.
        address: address of the first host.
        port: rendezvous port, which the job will use as well.
        mebibytes: amount of data that each rank sends, in MiB.

    Raises:
        UserError: the ranks cannot connect, or a rank fails.
    """
    shared = [f"--nnodes={len(hosts)}", f"--master_addr={address}", f"--master_port={port}"]
    shared += [
        f"--rdzv_conf=timeout={_RENDEZVOUS_SECONDS}",
        "--log_dir=/dev/null",  # by default, torchrun leaves a folder in TMPDIR
    ]
    processes = []
    for number, host in enumerate(hosts):
        own = [f"--node_rank={number}", f"--nproc_per_node={host.slots}", "-m", "hypermoe_ds.cluster.interconnect"]
        processes.append(starter.start(host, _MEASURE_SECONDS, "torch.distributed.run", *shared, *own, str(mebibytes)))
    outputs = _outputs(processes)
    for line in outputs[0].splitlines():
        if line.startswith(INTERCONNECT):
            return Interconnect(**json.loads(line.removeprefix(INTERCONNECT)))
    failed = [
        (host.name, text)
        for host, process, text in zip(hosts, processes, outputs, strict=True)
        if process.returncode > 0
    ]
    name, text = failed[0] if failed else (hosts[0].name, outputs[0])
    if "EADDRINUSE" in text:
        remedy = "set another MASTER_PORT, or end the job that uses it"
        raise UserError(f"MASTER_PORT={port}", f"is in use on {name}", remedy)
    errors = [line.strip() for line in text.splitlines() if "Error" in line] or text.splitlines()[-1:] or ["no output"]
    remedy = "open the ports between the hosts; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network"
    raise UserError(f"port {port} of {address}", f"the ranks cannot exchange data ({name}: {errors[-1][:160]})", remedy)


def _outputs(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Return the output of each process. If one fails, kill the others after 5 s, because they would wait for it."""
    with ThreadPoolExecutor(len(processes)) as pool:
        outputs = [pool.submit(_output, process) for process in processes]
        for output in as_completed(outputs):
            if processes[outputs.index(output)].returncode:
                wait(outputs, timeout=_SECONDS_AFTER_FAILURE)
                for process in processes:
                    process.kill()
    return [output.result() for output in outputs]


def _output(process: subprocess.Popen[str]) -> str:
    with process, _ended_after(process, _MEASURE_SECONDS + 10):
        text = process.stdout.read() if process.stdout else ""
        process.wait()
    return text


def check_interconnect(interconnect: Interconnect, hosts: Sequence[Host], least: float) -> list[Failure]:
    """Return a failure for each collective with a wrong result and for each slow pair of hosts.

    A pair is slow if its bandwidth is below `least` or below a third of the median over all pairs. Of the two
    hosts, the one that is in more slow pairs is considered responsible.

    Args:
        interconnect: the measured interconnect.
        hosts: all hosts, in the order of their indices.
        least: minimum bandwidth of each pair in GB/s.
    """
    failures = [
        Failure(None, UserError(exchange, "returned a wrong result", "check memory and network hardware"))
        for exchange in sorted(set(interconnect.wrong))
    ]
    usual = median([speed for *_, speed in interconnect.pairs]) if interconnect.pairs else 0.0
    slow = [pair for pair in interconnect.pairs if pair[2] < max(least, usual * _SLOW_SHARE)]
    count = Counter(host for pair in slow for host in pair[:2])
    for one, other, speed in slow:
        where = f"{hosts[one].name} - {hosts[other].name}"
        problem, remedy = f"{speed:.2f} GB/s, but {least:.2f} GB/s are required", "check their cables and ports"
        if speed >= least:
            problem = f"{speed:.2f} GB/s, but the median over all pairs is {usual:.2f} GB/s"
            remedy = "check the cables and ports of the host whose pairs are all slow"
        culprit = max(one, other, key=lambda host: (count[host], host))
        failures.append(Failure(hosts[culprit], UserError(where, problem, remedy)))
    return failures


class Fit(NamedTuple):
    """Hosts that can train together, and their expert-parallel size."""

    hosts: Sequence[Host]
    expert: int


def fit(hosts: Sequence[Host], global_batch_size: int, micro_batch_size: int, expert: int, num_experts: int) -> Fit:
    """Return the longest prefix of `hosts` whose ranks can split the global batch evenly.

    Args:
        hosts: hosts that passed the checks.
        global_batch_size: sequences per optimizer step, over all ranks.
        micro_batch_size: sequences per forward pass on one rank.
        expert: largest number of ranks that share one copy of the experts.
        num_experts: number of experts per layer.

    Raises:
        UserError: no prefix can split the batch evenly.
    """
    slots = [host.slots for host in hosts]
    chosen = hosts[: hosts_that_fit(slots, global_batch_size, micro_batch_size)]
    if not chosen:
        problem = f"cannot be split evenly over the ranks of {', '.join(host.name for host in hosts)} or fewer hosts"
        remedy = f"choose a multiple of {micro_batch_size * (slots[0] if slots else 1)}"
        raise UserError(f"train.global_batch_size={global_batch_size}", problem, remedy)
    ranks = sum(host.slots for host in chosen)
    return Fit(chosen, largest_expert_parallel(expert, num_experts, ranks))


def table(answers: Sequence[HostAnswer]) -> str:
    """Format the hosts' reports as a table, one line per host."""
    rows = [["host", "slots", *_ALIKE, "shared memory", "disk", "clock"]]
    for answer in answers:
        row = [answer.host.name, str(answer.host.slots)]
        if answer.report is None:
            row += ["no answer"]
        else:
            row += [_shown(getattr(answer.report, name))[:40] for name in _ALIKE]
            row += [
                f"{answer.report.memory_gib:.1f} GiB",
                f"{answer.report.disk_gib:.1f} GiB",
                f"{round(answer.clock_ahead, 1) + 0.0:+.1f} s",
            ]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def interconnect_line(interconnect: Interconnect, hosts: Sequence[Host], mebibytes: int) -> str:
    """Format the measured bandwidths and the slowest pair in one line."""
    parts = [f"all-reduce {_speed(interconnect.all_reduce)}", f"all-to-all {_speed(interconnect.all_to_all)}"]
    if interconnect.pairs:
        one, other, speed = min(interconnect.pairs, key=lambda pair: pair[2])
        parts.append(f"slowest pair {hosts[one].name} - {hosts[other].name} {_speed(speed)}")
    return f"{mebibytes} MiB per rank: {', '.join(parts)}"


def _speed(value: float | None) -> str:
    return "not measured (one rank)" if value is None else f"{value:.2f} GB/s"


def _shown(value: str | Sequence[str] | None) -> str:
    if value is None:
        return "CPU"
    if isinstance(value, str):
        return value
    return ", ".join(f"{count} x {name}" for name, count in Counter(value).items()) or "no GPU"
