"""Tests of hostfiles, Slurm's hosts, and commands that run on a host."""

import re
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from hypermoe_ds.cluster.hosts import (
    Host,
    forwarded_environment,
    read_environment,
    read_hostfile,
    rendezvous,
    shell_line,
    slurm_hosts,
    this_host,
)
from hypermoe_ds.errors import UserError

REPOSITORY = Path(__file__).parents[3]

TEXT = "# hosts\nnode1 slots=8\n\n  node2\tslots=4\nten.nine-8 slots=16 # big\n"
# ssh and mpirun would read these names as options, pdsh as files, patterns or lists, and a shell as commands.
NOT_HOSTS = ["-oProxyCommand=id", "--", "^all", "/n1/", "n[1-2]", "a,b", "$(id)", "`id`", "a;id", "a%h"]


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text(TEXT)
    assert {host.name: host.slots for host in read_hostfile(path)} == dict(fetch_hostfile(str(path)))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a slots=1\nb\n", ":2: 'b' is not a host; write 'host slots=RANKS'"),
        ("a slots=0\n", ":1: 'a slots=0' is not a host; write"),
        *((f"{name} slots=1\n", f":1: '{name} slots=1' is not a host; write") for name in NOT_HOSTS),
        ("a slots=1\na slots=2\n", ":2: names a again; give each host one line"),
        ("# none\n", ": names no host; write 'host slots=RANKS'"),
    ],
)
def test_a_mistake_in_a_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, answer: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path}{answer}")):
        read_hostfile(path)


@pytest.mark.parametrize("name", NOT_HOSTS)
def test_an_address_that_is_an_option_or_a_pattern_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"MASTER_ADDR={name}: is not a host; set it to a name")):
        rendezvous([Host("a", 1)], {"MASTER_ADDR": name})


def test_a_missing_hostfile_is_reported_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: cannot be read .*launch/hostfile\.example"):
        read_hostfile(tmp_path / "none")


def test_the_hosts_of_a_slurm_job_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "8"}
    assert slurm_hosts(job) == [Host("n1", 8, "srun"), Host("n2", 8, "srun")]
    with pytest.raises(UserError, match=r"SLURM_JOB_NODELIST=n\[3\]: .*scontrol fails"):
        slurm_hosts({**job, "SLURM_JOB_NODELIST": "n[3]"})
    with pytest.raises(UserError, match=r"SLURM_JOB_NODELIST.* is not set; .*--hostfile"):
        slurm_hosts({})


def test_a_shell_line_preserves_every_word(tmp_path: Path) -> None:
    folder = tmp_path / "a folder's"
    folder.mkdir()
    line = shell_line(["printf", r"%s\n", "$X", 'a "b"'], {"X": "it's $HOME; #1"}, folder)
    assert output_of(line) == '$X\na "b"\n'
    line = shell_line(["bash", "-c", 'echo "$X"; pwd'], {"X": "it's $HOME; #1"}, folder)
    assert output_of(line) == f"it's $HOME; #1\n{folder}\n"


def output_of(line: str) -> str:
    [host] = this_host("1", 0)
    pipe = subprocess.PIPE
    with subprocess.Popen(host.command(line), stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        assert process.wait(30) == 0
        return printed


@pytest.mark.parametrize(
    ("reach", "options", "expected"),
    [
        ("ssh", None, ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]),
        ("ssh", "-p 2222 -i 'a key'", ["ssh", "-p", "2222", "-i", "a key", "n1", "exec bash -c true"]),
        (
            "srun",
            None,
            [
                "srun",
                "--nodes=1",
                "--ntasks=1",
                "--nodelist=n1",
                "--overlap",
                "--mpi=none",
                "--export=ALL",
                "bash",
                "-c",
            ],
        ),
        ("here", None, ["bash", "-c", "true"]),
    ],
)
def test_a_host_is_reached_by_ssh_or_srun_or_directly(
    reach: str, options: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYPERMOE_SSH_OPTIONS", raising=False)
    if options is not None:
        monkeypatch.setenv("HYPERMOE_SSH_OPTIONS", options)
    command = Host("n1", 8, reach).command("true")
    assert command[: len(expected)] == expected
    assert command[-1].endswith("true")


@pytest.mark.parametrize(
    ("slots", "gpus", "ranks"),
    [("3", 0, 3), ("gpu", 8, 8), ("auto", 2, 2), ("gpu", 0, 1), ("0", 1, None), ("x", 1, None)],
)
def test_this_machine_has_as_many_ranks_as_given_or_one_per_gpu(slots: str, gpus: int, ranks: int | None) -> None:
    if ranks is None:
        with pytest.raises(UserError, match=rf"^slots={slots}: is not a number of ranks; give a number, or gpu"):
            this_host(slots, gpus)
    else:
        assert [host.slots for host in this_host(slots, gpus)] == [ranks]


def test_several_hosts_use_the_rendezvous_of_the_job_and_one_host_another_port() -> None:
    hosts, job = [Host("n1", 8), Host("n2", 8)], {"MASTER_ADDR": "ib1", "MASTER_PORT": "4000"}
    assert rendezvous(hosts, job) == ("ib1", 4000)
    assert rendezvous(hosts, {}) == ("n1", 29500)
    address, port = rendezvous(this_host("8", 0), job)
    assert address == "127.0.0.1"
    assert port != 4000
    with pytest.raises(UserError, match=r"^MASTER_PORT=x: is not a number"):
        rendezvous(hosts, {"MASTER_PORT": "x"})


def test_an_environment_file_is_read_as_deepspeed_reads_it_and_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text("A=1\nB=x=y z\n_C=\n")
    assert read_environment(path) == {"A": "1", "B": "x=y z", "_C": ""}
    path.write_text("A=1\n\n")
    with pytest.raises(UserError, match=r"env:2: '' is not a variable; write one NAME=VALUE"):
        read_environment(path)


def test_the_launch_scripts_forward_the_same_variables(tmp_path: Path) -> None:
    given = {"NCCL_DEBUG": "INFO", "MY_NCCL_X": "1", "GLOO_A": "", "PATH": "/usr/bin:/bin", "PATHS": "x", "LANG": "C"}
    patterns = REPOSITORY / "launch/forwarded_environment.txt"
    source = f"source {REPOSITORY}/launch/defaults.sh; forwarded_names"
    listed = subprocess.run(["bash", "-c", source], env=given, capture_output=True, text=True, check=True)
    own = {"HYPERMOE_SSH_OPTIONS", "MASTER_PORT"}  # the launch scripts set these themselves
    assert {name for name in listed.stdout.split() if given.get(name)} == forwarded_environment(patterns, given).keys()
    assert set(listed.stdout.split()) - given.keys() == own
    assert forwarded_environment(patterns, given) == {"NCCL_DEBUG": "INFO", "PATH": "/usr/bin:/bin"}
