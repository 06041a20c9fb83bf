"""Run the launch scripts with stubs for the programs that they start."""

import shlex
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
TRAIN = f"{REPOSITORY}/pretrain/train.py"
SYSTEM = "/usr/local/bin:/usr/bin:/bin"
ZERO1 = ["--deepspeed_config", f"{REPOSITORY}/ds_configs/zero1.json"]


def stub(path: Path, body: str) -> None:
    """Write an executable bash script with the given body."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def launch(
    script: str, *arguments: str, folder: Path, path: str = SYSTEM, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a launch script in `folder` with only PATH, HOME, HYPERMOE_VENV and the given environment variables."""
    variables = {"PATH": path, "HOME": str(folder), "HYPERMOE_VENV": str(folder / "venv"), **environment}
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments], env=variables, cwd=folder, capture_output=True, text=True, check=False,
        timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def commands(script: str, *arguments: str, folder: Path, **environment: str) -> list[list[str]]:
    """Return the commands that a dry run of the script prints, each split into words."""
    done = launch(script, "--dry-run", *arguments, folder=folder, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [shlex.split(line.removeprefix("+")) for line in done.stdout.splitlines() if line.startswith("+")]
