"""Run the project's scripts as a user would, with a small recipe.

`launch` uses the DeepSpeed launcher. `run_script` runs a script in processes that have already imported the libraries,
with the environment variables that the launcher would set. This is ten times faster than the launcher.
"""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hypermoe_ds.monitor.summary import read_records
from tests.helpers.corpus import TokenisedCorpus
from tests.helpers.ranks import CPU, process_group, run_in_processes

REPOSITORY = Path(__file__).parents[2]
TRAIN = "pretrain/train.py"
RECORDED_TRAIN = "tests/helpers/recorded_train.py"
RUNTIME_METRICS = ("time", "tokens_per_second", "tokens_per_second_per_gpu", "peak_memory_gib", "step_seconds")
_SECONDS = 300


@dataclass(frozen=True)
class CompletedRun:
    """Exit code and output of a process."""

    returncode: int
    stdout: str
    stderr: str

    def output(self) -> str:
        """Return stdout followed by stderr."""
        return f"{self.stdout}\n{self.stderr}"


@dataclass(frozen=True)
class Job:
    """A running job.

    Attributes:
        process: process that was started, usually the launcher.
        folder: working directory; the job writes its output to files named `stdout` and `stderr` there.
        port: rendezvous port of the ranks.
    """

    process: "subprocess.Popen[bytes]"
    folder: Path
    port: int

    def finish(self) -> CompletedRun:
        """Wait for the job to end, and return its exit code and output."""
        try:
            code = self.process.wait(_SECONDS)
        finally:
            self.process.kill()
            # Delete the shared memory that DeepSpeed leaves behind, 66 MB per rank.
            for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
                buffer.unlink()
        return CompletedRun(code, *((self.folder / name).read_text() for name in ("stdout", "stderr")))


def start(
    ranks: int, *arguments: object, folder: Path, script: str = TRAIN, before: Sequence[object] = (), **variables: str
) -> Job:
    """Start `BEFORE deepspeed --num_gpus RANKS SCRIPT ARGUMENTS` in `folder` with these extra environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*before, Path(sys.executable).parent / "deepspeed", "--num_gpus", ranks, "--master_port", port]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [str(word) for word in (*command, REPOSITORY / script, *arguments)],
            env={**os.environ, **CPU, "PATH": path, "PYTHONPATH": str(REPOSITORY), **variables},
            stdout=out, stderr=errors, cwd=folder,
        )  # fmt: skip
    return Job(process, folder, port)


def launch(ranks: int, *arguments: object, folder: Path) -> CompletedRun:
    """Run `deepspeed --num_gpus RANKS pretrain/train.py ARGUMENTS` in `folder`."""
    return start(ranks, *arguments, folder=folder).finish()


def run_script(
    script: str,
    *arguments: object,
    folder: Path,
    ranks: int = 1,
    free_bytes: int | None = None,
    code: int = 0,
    **variables: str,
) -> CompletedRun:
    """Run a script of the repository on `ranks` ranks, and return the exit code and output of rank 0.

    With more than one rank, assert that every rank exits with `code`. After a `UserError` or `MachineError`, all ranks
    except rank 0 exit 30 s later, because no launcher ends them here.

    Args:
        script: path of the script, relative to the repository.
        arguments: command-line arguments of the script.
        folder: working directory.
        ranks: number of processes.
        free_bytes: free disk space to simulate, in bytes; None uses the real value.
        code: expected exit code, checked only with more than one rank.
        variables: extra environment variables.
    """
    words = [str(word) for word in arguments]
    with process_group(ranks) as environments:
        extended = [environment | variables for environment in environments]
        done = run_in_processes(extended, run_here, REPOSITORY / script, words, folder, free_bytes)
    assert ranks == 1 or {rank.returncode for rank in done} == {code}, "\n".join(rank.output() for rank in done)
    first: CompletedRun = done[0]
    return first


class _Disk(NamedTuple):
    total: int
    used: int
    free: int


def run_here(script: Path, arguments: list[str], folder: Path, free_bytes: int | None = None) -> CompletedRun:
    """Run a script in this process, and return its exit code and output."""
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    if free_bytes is not None:
        shutil.disk_usage = lambda _path: _Disk(2 * free_bytes, free_bytes, free_bytes)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as streams:
        with _redirected_to(Path(streams)):
            code = _exit_code(script)
        return CompletedRun(code, *((Path(streams) / name).read_text() for name in ("stdout", "stderr")))


def _exit_code(script: Path) -> int:
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _redirected_to(folder: Path) -> Iterator[None]:
    """Redirect the output of this process and its C++ libraries to the files `stdout` and `stderr` in `folder`."""
    saved = [os.dup(number) for number in (1, 2)]
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip((1, 2), saved, strict=True):
            os.dup2(original, number)


def small_recipe(corpus: TokenisedCorpus, run_dir: Path | str) -> dict[str, Any]:
    """Return the recipe of a small model that trains in seconds on two ranks."""
    return {
        "run": {"dir": str(run_dir)},
        "model": {
            "vocab_size": 512,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_embedding_size": 8,
            "selection_hidden_size": 8,
            "hypernetwork_input_size": 8,
            "bottleneck_size": 8,
            "adapter_size": 8,
        },
        "data": {
            "train": [{"prefix": corpus.train}],
            "valid": [{"prefix": corpus.valid}],
            "sequence_length": 32,
            "tokenizer": str(corpus.tokenizer),
        },
        "train": {"steps": 8, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "parallel": {"expert": 1},
        "checkpoint": {"interval": 2, "keep_last": 2},
        "evaluation": {"interval": 4, "prompts": ["import os"], "prompt_tokens": 4},
        "monitor": {"interval": 1, "norms_interval": 4},
    }


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    """Write a recipe as YAML and return its path."""
    path.write_text(yaml.safe_dump(dict(recipe)))
    return path


def arguments_of(recipe: Path, *overrides: str, stage: int = 1) -> list[str]:
    """Return the command-line arguments of pretrain/train.py for a recipe."""
    return [
        f"--config={recipe}",
        f"--deepspeed_config={REPOSITORY / 'ds_configs' / f'zero{stage}.json'}",
        *overrides,
    ]


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run's training steps, except time, throughput and memory, which vary between runs."""
    records = [record for record in read_records(run / "metrics.jsonl") if "loss" in record]
    return [
        {key: value for key, value in record.items() if key.partition("/")[0] not in RUNTIME_METRICS}
        for record in records
    ]
