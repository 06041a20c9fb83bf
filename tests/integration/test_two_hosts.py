"""Training over two hosts: the launch scripts of a hostfile, with the experts spread over both."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import REPOSITORY, TRAIN, Done, arguments_of, run_script
from tests.helpers.two_hosts import NAMES, TwoHosts, two_hosts, why_not

STEPS = 20
SETTINGS = [f"train.steps={STEPS}", "parallel.expert=2", f"evaluation.interval={STEPS}", f"checkpoint.interval={STEPS}"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if missing := why_not():
        pytest.skip(missing)
    with two_hosts(tmp_path_factory.mktemp("two") / "hosts") as up:
        yield up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs are started."""
    made = tmp_path_factory.mktemp("start")
    (made / "hostfile").write_text("left slots=1\nright slots=1\n")
    return made


@pytest.fixture(scope="module")
def one_host(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same two ranks on one host."""
    run = tmp_path_factory.mktemp("one") / "run"
    run_script(TRAIN, *arguments_of(recipe, f"run.dir={run}", *SETTINGS), folder=run.parent, ranks=2)
    return losses(run)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def start(hosts: TwoHosts, *words: object, folder: Path) -> Done:
    """A command on the first host."""
    return hosts.run("left", *words, folder=folder, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


@pytest.mark.parametrize(("script", "command"), [("pdsh.sh", "pdsh"), ("openmpi.sh", "mpirun")])
def test_experts_spread_over_two_hosts_reach_the_losses_of_one_host_to_the_bit(
    hosts: TwoHosts, one_host: list[float], folder: Path, recipe: Path, script: str, command: str
) -> None:
    if missing := why_not(command):
        pytest.skip(missing)
    run = folder / script
    arguments = arguments_of(recipe, f"run.dir={run}", *SETTINGS)
    done = start(hosts, "bash", REPOSITORY / "launch" / script, "--no-preflight", *arguments, folder=folder)
    assert done.returncode == 0, done.told()
    assert len(one_host) == STEPS
    assert losses(run) == one_host
    assert "2 ranks on 2 hosts; expert parallel 2" in done.stdout
    manifest = json.loads((run / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())
    assert len(manifest["files"]) == 2


def test_two_hosts_that_are_fit_for_a_job_are_told_with_the_speed_between_them(
    hosts: TwoHosts, folder: Path, recipe: Path
) -> None:
    arguments = [*arguments_of(recipe, f"run.dir={folder / 'run'}"), "--mebibytes=8"]
    done = start(hosts, "python", REPOSITORY / "tools/preflight.py", *arguments, folder=folder)
    assert done.returncode == 0, done.told()
    header, *rows, links = done.stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["left", "1"], ["right", "1"]]
    assert "settings" in header
    assert "slowest pair left - right" in links
    assert not (folder / "run").exists()


def test_a_host_with_a_run_folder_and_a_recipe_of_its_own_is_told_both(
    hosts: TwoHosts, folder: Path, recipe: Path
) -> None:
    run, shared, own = folder / "unlike", folder / "recipe.yaml", folder / "own.yaml"
    run.mkdir()
    shared.write_text(recipe.read_text())
    own.write_text(recipe.read_text().replace("steps: 8", "steps: 9"))
    for mount in (["-t", "tmpfs", "tmpfs", run], ["--bind", own, shared]):  # in the namespace of that host alone
        done = hosts.run("right", "mount", *mount, folder=folder)
        assert done.returncode == 0, done.told()
    words = ["python", REPOSITORY / "tools/preflight.py", *arguments_of(shared, f"run.dir={run}")]
    done = start(hosts, *words, folder=folder)
    assert done.returncode == 2
    settings, storage = done.stderr.splitlines()
    assert settings.startswith(("error: right: settings: is ", "error: left: settings: is "))
    assert storage.startswith(f"error: right: run.dir={run}: is not the folder that this machine sees there; ")
    assert "all-reduce" not in done.stdout


def test_a_host_whose_cable_is_out_keeps_a_job_from_starting(hosts: TwoHosts, folder: Path, recipe: Path) -> None:
    words = ["bash", REPOSITORY / "launch/openmpi.sh", *arguments_of(recipe, f"run.dir={folder / 'cut'}")]
    hosts.cut("right")
    try:
        done = start(hosts, "env", "HYPERMOE_SSH_OPTIONS=-o BatchMode=yes -o ConnectTimeout=1", *words, folder=folder)
    finally:
        hosts.mend("right")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: right: does not answer (ssh: connect to host right port 22: ")
    assert "right true` work without a password" in line


def running(hosts: TwoHosts, host: str, command: str, folder: Path) -> list[str]:
    """Processes there whose command line fits."""
    return hosts.run(host, "pgrep", "-f", command, folder=folder).stdout.split()


def exchanging(hosts: TwoHosts, folder: Path) -> list[str]:
    """Processes of a preflight's exchange, anywhere."""
    return [process for host in NAMES for process in running(hosts, host, "hypermoe_ds.cluster.interconnect", folder)]


LISTEN = "import socket, time; s = socket.create_server(('', 29500)); print('on', flush=True); time.sleep(600)"


def test_a_port_that_is_taken_is_told_and_ends_the_exchange_on_all_hosts(
    hosts: TwoHosts, folder: Path, recipe: Path
) -> None:
    arguments = arguments_of(recipe, f"run.dir={folder / 'run'}")
    pipe = subprocess.PIPE
    with hosts.start("left", "python", "-c", LISTEN, folder=folder, out=pipe, errors=pipe) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "on\n"
        done = start(hosts, "python", REPOSITORY / "tools/preflight.py", *arguments, folder=folder)
        hosts.run("left", "kill", *running(hosts, "left", "socket.create_server", folder), folder=folder)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: MASTER_PORT=29500: is in use on left; set another MASTER_PORT, or end the job that has it\n"
    )
    assert exchanging(hosts, folder) == []


def test_an_exchange_ends_on_all_hosts_when_its_preflight_is_killed(
    hosts: TwoHosts, folder: Path, recipe: Path
) -> None:
    words = ["python", REPOSITORY / "tools/preflight.py", *arguments_of(recipe, f"run.dir={folder / 'run'}")]
    pipe = subprocess.PIPE
    with hosts.start("left", *words, "--mebibytes=2000", folder=folder, out=pipe, errors=pipe) as process:
        until(lambda: running(hosts, "right", "hypermoe_ds.cluster.interconnect", folder) != [])
        preflight = running(hosts, "left", "^python .*tools/preflight.py", folder)
        hosts.run("left", "kill", "-KILL", *preflight, folder=folder)
        process.wait(30)
    until(lambda: exchanging(hosts, folder) == [])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
