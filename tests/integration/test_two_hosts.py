"""Train on two hosts through launch/pdsh.sh and launch/openmpi.sh, with one expert-parallel rank on each."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import REPOSITORY, TRAIN, CompletedRun, arguments_of, run_script
from tests.helpers.two_hosts import NAMES, TwoHosts, two_hosts, unsupported_reason

STEPS = 20
SETTINGS = [f"train.steps={STEPS}", "parallel.expert=2", f"evaluation.interval={STEPS}", f"checkpoint.interval={STEPS}"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if missing := unsupported_reason():
        pytest.skip(missing)
    with two_hosts(tmp_path_factory.mktemp("two") / "hosts") as up:
        yield up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working directory of the jobs, with a hostfile of both hosts."""
    path = tmp_path_factory.mktemp("run_on_left")
    (path / "hostfile").write_text("left slots=1\nright slots=1\n")
    return path


@pytest.fixture(scope="module")
def losses_on_one_host(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Train the job of these tests with both ranks on one host, and return its losses."""
    run = tmp_path_factory.mktemp("one") / "run"
    run_script(TRAIN, *arguments_of(recipe, f"run.dir={run}", *SETTINGS), folder=run.parent, ranks=2)
    return losses(run)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def run_on_left(hosts: TwoHosts, *command: object, folder: Path) -> CompletedRun:
    environment = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rtc_hwloc_vmhole": "none",  # orted can crash when it maps hwloc's topology at a free address
    }  # fmt: skip
    return hosts.run("left", *command, folder=folder, **environment)


@pytest.mark.parametrize(("script", "command"), [("pdsh.sh", "pdsh"), ("openmpi.sh", "mpirun")])
def test_losses_on_two_hosts_are_bitwise_identical_to_those_on_one_host(
    hosts: TwoHosts, losses_on_one_host: list[float], folder: Path, recipe: Path, script: str, command: str
) -> None:
    if missing := unsupported_reason(command):
        pytest.skip(missing)
    run = folder / script
    arguments = arguments_of(recipe, f"run.dir={run}", *SETTINGS)
    done = run_on_left(hosts, "bash", REPOSITORY / "launch" / script, "--no-preflight", *arguments, folder=folder)
    assert done.returncode == 0, done.output()
    assert len(losses_on_one_host) == STEPS
    assert losses(run) == losses_on_one_host
    assert "2 ranks on 2 hosts; expert parallel 2" in done.stdout
    manifest = json.loads((run / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())
    assert len(manifest["files"]) == 2


def test_preflight_lists_both_hosts_and_the_bandwidth_between_them(hosts: TwoHosts, folder: Path, recipe: Path) -> None:
    arguments = [*arguments_of(recipe, f"run.dir={folder / 'run'}"), "--mebibytes=8"]
    done = run_on_left(hosts, "python", REPOSITORY / "tools/preflight.py", *arguments, folder=folder)
    assert done.returncode == 0, done.output()
    header, *rows, interconnect = done.stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["left", "1"], ["right", "1"]]
    assert "settings" in header
    assert "slowest pair left - right" in interconnect
    assert not (folder / "run").exists()


def test_preflight_rejects_a_host_that_sees_another_recipe_and_another_run_folder(
    hosts: TwoHosts, folder: Path, recipe: Path
) -> None:
    run, shared, other = folder / "unlike", folder / "recipe.yaml", folder / "own.yaml"
    run.mkdir()
    shared.write_text(recipe.read_text())
    other.write_text(recipe.read_text().replace("steps: 8", "steps: 9"))
    for mount in (["-t", "tmpfs", "tmpfs", run], ["--bind", other, shared]):  # visible only on the second host
        done = hosts.run("right", "mount", *mount, folder=folder)
        assert done.returncode == 0, done.output()
    command = ["python", REPOSITORY / "tools/preflight.py", *arguments_of(shared, f"run.dir={run}")]
    done = run_on_left(hosts, *command, folder=folder)
    assert done.returncode == 2
    settings, storage = done.stderr.splitlines()
    assert re.match(r"error: (left|right): settings: [0-9a-f]{8}, but [0-9a-f]{8} on most hosts; copy ", settings)
    assert storage.startswith(f"error: right: run.dir={run}: is not the same folder as on this machine; ")
    assert "all-reduce" not in done.stdout


def test_a_job_does_not_start_when_a_host_is_unreachable(hosts: TwoHosts, folder: Path, recipe: Path) -> None:
    command = ["bash", REPOSITORY / "launch/openmpi.sh", *arguments_of(recipe, f"run.dir={folder / 'cut'}")]
    hosts.disconnect("right")
    try:
        done = run_on_left(
            hosts, "env", "HYPERMOE_SSH_OPTIONS=-o BatchMode=yes -o ConnectTimeout=1", *command, folder=folder
        )
    finally:
        hosts.reconnect("right")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: right: does not answer (ssh: connect to host right port 22: ")
    assert "right true` work without a password" in line


def process_ids(hosts: TwoHosts, host: str, pattern: str, folder: Path) -> list[str]:
    """Return the ids of the processes of a host whose command lines match a pattern."""
    return hosts.run(host, "pgrep", "-f", pattern, folder=folder).stdout.split()


def interconnect_processes(hosts: TwoHosts, folder: Path) -> list[str]:
    """Return the process ids of a preflight's interconnect test on both hosts."""
    return [
        process for host in NAMES for process in process_ids(hosts, host, "hypermoe_ds.cluster.interconnect", folder)
    ]


# This program keeps the default MASTER_PORT in use.
LISTEN = "import socket, time; s = socket.create_server(('', 29500)); print('on', flush=True); time.sleep(600)"


def test_a_port_in_use_is_reported_and_ends_the_interconnect_test_on_all_hosts(
    hosts: TwoHosts, folder: Path, recipe: Path
) -> None:
    arguments = arguments_of(recipe, f"run.dir={folder / 'run'}")
    pipe = subprocess.PIPE
    with hosts.start("left", "python", "-c", LISTEN, folder=folder, out=pipe, errors=pipe) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "on\n"
        done = run_on_left(hosts, "python", REPOSITORY / "tools/preflight.py", *arguments, folder=folder)
        hosts.run("left", "kill", *process_ids(hosts, "left", "socket.create_server", folder), folder=folder)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: MASTER_PORT=29500: is in use on left; set another MASTER_PORT, or end the job that uses it\n"
    )
    assert interconnect_processes(hosts, folder) == []


def test_a_killed_preflight_ends_its_interconnect_test_on_all_hosts(
    hosts: TwoHosts, folder: Path, recipe: Path
) -> None:
    command = ["python", REPOSITORY / "tools/preflight.py", *arguments_of(recipe, f"run.dir={folder / 'run'}")]
    pipe = subprocess.PIPE
    with hosts.start("left", *command, "--mebibytes=2000", folder=folder, out=pipe, errors=pipe) as process:
        wait_until(lambda: process_ids(hosts, "right", "hypermoe_ds.cluster.interconnect", folder) != [])
        preflight = process_ids(hosts, "left", "^python .*tools/preflight.py", folder)
        hosts.run("left", "kill", "-KILL", *preflight, folder=folder)
        process.wait(30)
    wait_until(lambda: interconnect_processes(hosts, folder) == [])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
