"""Check which output of a job reaches the terminal and which goes to log files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from hypermoe_ds.errors import EXIT_SAVED
from hypermoe_ds.resilience.heartbeat import read_heartbeats
from tests.helpers.corpus import TokenisedCorpus
from tests.helpers.jobs import REPOSITORY, CompletedRun, arguments_of, run_script, small_recipe, write_recipe
from tests.helpers.ranks import CPU

FAULTY = "tests/helpers/faulty_train.py"


def start_local(folder: Path, ranks: int, *arguments: str) -> "subprocess.Popen[str]":
    """Run launch/local.sh; FOLDER/output receives what the terminal would show."""
    environment = {
        **os.environ, **CPU, "HYPERMOE_VENV": sys.prefix, "PYTHONPATH": str(REPOSITORY), "MASTER_PORT": "29617"
    }  # fmt: skip
    command = ["bash", str(REPOSITORY / "launch/local.sh"), "--num_gpus", str(ranks), *arguments]
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )  # fmt: skip


def local(folder: Path, recipe: Path, *words: str) -> list[str]:
    """Run launch/local.sh with one rank, check that it fails, and return the lines on the terminal."""
    code = start_local(folder, 1, *arguments_of(recipe, *words)).wait(timeout=300)
    output = (folder / "output").read_text()
    assert code == 2, output
    return output.splitlines()


def test_a_user_error_is_the_last_line_on_the_terminal(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe(corpus, tmp_path / "run"))
    assert local(tmp_path, recipe, "train.step=3") == ["error: train.step: unknown key; did you mean 'steps'?"]
    assert not (tmp_path / "run").exists()
    command, error = local(tmp_path, recipe, "parallel.expert=2")  # the error is detected only after the ranks start
    assert command.startswith("+ deepspeed --log_level info --num_gpus 1 ")
    assert error == "error: parallel.expert=2: does not divide the number of ranks, 1; choose 1"
    log = (tmp_path / "run/logs/launcher.log").read_text()
    assert "[launch.py" in log
    assert "exits with return code = 2" in log


def test_sigterm_to_the_launch_script_lets_the_ranks_save_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    process = start_local(tmp_path, 2, *arguments_of(recipe, f"run.dir={tmp_path}/run", "train.steps=100000"))
    try:
        limit = time.monotonic() + 300
        while not any(heartbeat.step > 1 for heartbeat in read_heartbeats(tmp_path / "run/watch").values()):
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < limit
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=120) == EXIT_SAVED, (tmp_path / "output").read_text()
    finally:
        process.kill()
    newest = max(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert f"checkpoint of step {int(newest.removeprefix('step_'))}: on disk" in (tmp_path / "output").read_text()


def output_of(recipe: Path, folder: Path, *words: str, **variables: str) -> CompletedRun:
    return run_script(FAULTY, *arguments_of(recipe, f"run.dir={folder}/run", *words), folder=folder, **variables)


def test_the_terminal_shows_the_run_and_the_log_file_has_library_output(recipe: Path, tmp_path: Path) -> None:
    done = output_of(recipe, tmp_path, "train.stop_at_step=2", HYPERMOE_FAULT=f"none:0:1:{tmp_path}/fault")
    assert done.returncode == 0, done.output()
    assert done.stderr == ""
    names = [line.split()[0] for line in done.stdout.splitlines() if line and line[0] != " "]
    assert names[:7] == ["model", "layout", "batch", "data", "length", "device", "run"]
    assert names[-5:] == ["validation", "resume", "evaluate", "export", "report"]
    assert "auto_ep" not in done.output(), "the terminal shows a warning from DeepSpeed"
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert "auto_ep" in log
    assert log.count("=== launch of ") == 1
    begun, ended = map(json.loads, (tmp_path / "run/launches.jsonl").read_text().splitlines())
    assert (begun["step"], begun["world_size"], begun["datasets"]["train"]["weight"]) == (0, 1, 1.0)
    assert (ended["step"], ended["ended"]) == (2, "stop_at_step")


def test_verbose_shows_library_output_on_the_terminal(recipe: Path, tmp_path: Path) -> None:
    fault = f"none:0:1:{tmp_path}/fault"
    done = output_of(recipe, tmp_path, "--verbose", "train.stop_at_step=1", HYPERMOE_FAULT=fault)
    assert "auto_ep" in done.output()
    assert not (tmp_path / "run/logs").exists()
    quiet = output_of(recipe, tmp_path, HYPERMOE_FAULT=fault, HYPERMOE_LOG_LEVEL="loud")
    assert quiet.stderr == (
        "error: HYPERMOE_LOG_LEVEL=loud: is not a log level; set it to one of debug, info, warning, error, critical\n"
    )


def test_an_unexpected_error_is_one_line_that_names_the_file_with_the_traceback(recipe: Path, tmp_path: Path) -> None:
    done = output_of(recipe, tmp_path, HYPERMOE_FAULT=f"error:0:2:{tmp_path}/fault")
    log = tmp_path / "run/logs/rank_00000.log"
    assert done.returncode == 1
    expected = f"error: rank 0: ZeroDivisionError: division by zero; the traceback is at the end of {log}\n"
    assert done.stderr == expected
    *_, last = log.read_text().splitlines()
    assert last == "ZeroDivisionError: division by zero"
    assert "Traceback (most recent call last):" in log.read_text()
