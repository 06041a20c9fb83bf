"""Arguments and environment variables reach other hosts unchanged, through the real launchers and a fake ssh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
WORDS = [
    "a=$(touch ran)", "a=`touch ran`", "a=$HOME", "a=b;touch ran", "a=b&&touch ran|c>d<e", "a=(b)#!~*?", "~", "*",
    "a={b,c}", "data.train=[{prefix: a b, weight: 1}]", 'a="b"', 'a="b c"', "it's", "it's $(touch ran) `touch ran`",
    "a\\b", "a\\b c\\", "a\tb", "100%", "%h", "a=%n %%u",
]  # fmt: skip
VALUE = "$(touch ran) `touch ran` \\ \" ' %h $HOME;"
# A fake ssh that runs the command locally and runs RANK, defined below, instead of DeepSpeed's launcher.
SSH = """
while [[ $1 != node? ]]; do shift; done
shift
exec sh -c "$(sed 's#[^ ]*python[0-9.]* -u -m deepspeed.launcher.launch#python#' <<<"$*")"
"""
RANK = 'while [[ $1 != *train.py ]]; do shift; done; printf "%s\\0" "$HYPERMOE_X" "${@:2}" >arguments.$$'


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("script", "command"), [("pdsh.sh", "pdsh"), ("openmpi.sh", "mpirun")])
def test_arguments_and_variables_reach_the_ranks_on_other_hosts_unchanged(
    script: str, command: str, tmp_path: Path
) -> None:
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    program(tmp_path / "venv/bin/python", RANK)
    program(tmp_path / "venv/bin/ssh", SSH)
    deepspeed = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (tmp_path / "venv/bin/deepspeed").symlink_to(deepspeed or "")
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HYPERMOE_VENV": str(tmp_path / "venv"), "HYPERMOE_X": VALUE,
        "MASTER_ADDR": "node1", "DS_ACCELERATOR": "cpu", "PYTHONSTARTUP": "$(touch ran)",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rtc_hwloc_vmhole": "none",  # orted can crash when it maps hwloc's topology at a free address
    }  # fmt: skip
    words = ["bash", str(LAUNCH / script), "--no-preflight", "--config", "r.yaml", *WORDS]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    received = [path.read_text().split("\0")[:-1] for path in tmp_path.glob("arguments.*")]
    assert [(value, rest[-len(WORDS) :]) for value, *rest in received] == [(VALUE, WORDS)] * 2
    assert not (tmp_path / "ran").exists()
