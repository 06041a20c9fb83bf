"""Real jobs with faults end as documented, and resumed jobs end with the results of an uninterrupted run.

Tests that wait 30 s for the launcher or launch a job several times are marked slow.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hypermoe_ds.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_SAVED
from hypermoe_ds.resilience.heartbeat import read_heartbeats
from tests.helpers.faulty_train import PARAMETER
from tests.helpers.jobs import REPOSITORY, TRAIN, CompletedRun, Job, arguments_of, logged_steps, run_script, start

RANKS = 2
STEPS = 8
FAULTY = "tests/helpers/faulty_train.py"
SUPERVISOR = (sys.executable, REPOSITORY / "launch/supervise.py")


def arguments(recipe: Path, folder: Path, *overrides: str) -> list[str]:
    return arguments_of(recipe, f"run.dir={folder / 'run'}", f"parallel.expert={RANKS}", *overrides)


def faulty(fault: str, recipe: Path, folder: Path, *overrides: str, before: tuple[object, ...] = ()) -> Job:
    """Start a job with a fault, given as KIND:RANK:STEP."""
    words = arguments(recipe, folder, *overrides)
    return start(
        RANKS, *words, folder=folder, script=FAULTY, before=before, HYPERMOE_FAULT=f"{fault}:{folder / 'fault'}"
    )


def resume(recipe: Path, folder: Path, *overrides: str) -> None:
    """Run the command of a faulty job again, without the fault."""
    done = start(RANKS, *arguments(recipe, folder, *overrides), folder=folder).finish()
    assert done.returncode == 0, done.output()


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/supervisor.jsonl").read_text().splitlines()]


def assert_ends_as(folder: Path, undisturbed: Path) -> None:
    """Check that both runs logged the same steps and that their last checkpoints are bitwise identical."""
    assert logged_steps(folder / "run") == logged_steps(undisturbed)
    ours, theirs = (
        json.loads((run / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())
        for run in (folder / "run", undisturbed)
    )
    assert ours["files"] == theirs["files"], "the hashes of the files differ"


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the running processes of a job."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(str(folder) in word for word in words) and process.pid != os.getpid():
            found.append(process)
    return found


def assert_no_process_remains(folder: Path) -> None:
    """Check that all processes end. Data loader workers can take 5 s, the interval at which they check their rank."""
    _, alive = psutil.wait_procs(processes_of(folder), timeout=20)
    assert alive == []


def one_error_line(done: CompletedRun) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.output()
    return lines[0]


def test_a_signal_to_one_rank_saves_on_all_ranks_and_the_same_command_resumes(
    recipe: Path, reference_run: Path, tmp_path: Path
) -> None:
    words = arguments(recipe, tmp_path)
    fault = f"term:1:3:{tmp_path / 'fault'}"
    done = run_script(FAULTY, *words, folder=tmp_path, ranks=RANKS, code=EXIT_SAVED, HYPERMOE_FAULT=fault)
    assert "received a signal: saving step 3" in done.stdout
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_00000003"
    run_script(TRAIN, *words, folder=tmp_path, ranks=RANKS)
    assert_ends_as(tmp_path, reference_run)


@pytest.mark.slow
def test_the_launcher_returns_the_exit_code_of_a_saved_run(recipe: Path, reference_run: Path, tmp_path: Path) -> None:
    done = faulty("term:1:3", recipe, tmp_path).finish()
    assert done.returncode == EXIT_SAVED, done.output()
    assert "received a signal: saving step 3" in done.stdout
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_00000003"
    assert_no_process_remains(tmp_path)
    resume(recipe, tmp_path)
    assert_ends_as(tmp_path, reference_run)


def test_a_killed_rank_is_reported_and_the_supervisor_restarts_the_job(
    recipe: Path, reference_run: Path, tmp_path: Path
) -> None:
    done = faulty("kill:1:4", recipe, tmp_path, before=(*SUPERVISOR, "--")).finish()
    assert done.returncode == 0, done.output()
    line = one_error_line(done)
    assert line.startswith("error: rank 1 (process ")
    assert " died, last seen in step " in line
    assert "; rank 0 waited in step 4, forward and backward; stacks" in line
    first, second = history(tmp_path)
    assert (first["outcome"], first["step"], second["outcome"]) == ("lost", 4, "done")
    assert first["what"] in line
    assert_no_process_remains(tmp_path)
    assert_ends_as(tmp_path, reference_run)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_the_step(recipe: Path, reference_run: Path, tmp_path: Path) -> None:
    done = faulty("term_launcher:0:3", recipe, tmp_path).finish()
    assert done.returncode == 1, "this is the launcher's own exit code"
    saved = int((tmp_path / "run/checkpoints/latest").read_text().strip().removeprefix("step_"))
    assert saved in (3, 4), "the launcher polls, so the signal may arrive one step later"
    assert {heartbeat.end for heartbeat in read_heartbeats(tmp_path / "run/watch").values()} == {"saved"}
    assert_no_process_remains(tmp_path)
    resume(recipe, tmp_path)
    assert_ends_as(tmp_path, reference_run)


@pytest.mark.slow
def test_a_stopped_rank_is_reported_and_ends_with_the_job(recipe: Path, reference_run: Path, tmp_path: Path) -> None:
    done = faulty("stop:1:4", recipe, tmp_path, "train.collective_timeout=10").finish()
    assert done.returncode == EXIT_FAULT, done.output()
    line = one_error_line(done)
    assert line.startswith("error: rank 1 (process ")
    assert " sends no heartbeat, last seen in step " in line
    assert "; rank 0 waited in step 4, forward and backward; stacks" in line
    assert "all_to_all_single" in (tmp_path / "run/watch/stack_00000.txt").read_text()
    assert_no_process_remains(tmp_path)
    resume(recipe, tmp_path)
    assert_ends_as(tmp_path, reference_run)


def test_a_step_with_a_nan_in_one_gradient_only_skips_its_samples(recipe: Path, tmp_path: Path) -> None:
    fault = f"nan:1:4:{tmp_path / 'fault'}"
    no_norms = "monitor.norms_interval=null"  # otherwise, the two runs would measure norms at different steps
    words = arguments(recipe, tmp_path, no_norms)
    done = run_script(FAULTY, *words, folder=tmp_path, ranks=RANKS, HYPERMOE_FAULT=fault)
    assert "warning: step 4 skipped: NaN or Inf in its loss (" in done.stdout
    assert "samples 24 to 31; 1 in a row, 1 in all" in done.stdout
    without = tmp_path / "without"
    without.mkdir()
    words = arguments(recipe, without, "train.skip_samples=[[24, 31]]", "train.stop_at_step=7", no_norms)
    run_script(TRAIN, *words, folder=without, ranks=RANKS)
    spoilt, whole = logged_steps(tmp_path / "run"), logged_steps(without / "run")
    assert (spoilt[3]["skipped_steps"], spoilt[3]["grad_norm"]) == (1, None)
    del spoilt[3]
    for one, other in zip(spoilt, whole, strict=True):
        for record in (one, other):
            del record["step"], record["skipped_steps"]
        counted = {
            key for key in one if key.startswith(("consumed_tokens", "epochs/"))
        }  # these metrics also count the bad step
        assert {key: one[key] for key in one.keys() - counted} == {key: other[key] for key in other.keys() - counted}


@pytest.mark.slow
def test_too_many_bad_steps_stop_the_run_and_report_the_last_good_checkpoint(recipe: Path, tmp_path: Path) -> None:
    done = faulty("nan:0:5", recipe, tmp_path, "train.max_bad_steps=0").finish()
    assert done.returncode == EXIT_BAD_INPUT, done.output()
    assert f"resume from the last good checkpoint, {tmp_path}/run/checkpoints/step_00000004" in one_error_line(done)


@pytest.mark.slow
def test_a_flipped_bit_in_one_replica_of_a_parameter_stops_the_run(
    recipe: Path, reference_run: Path, tmp_path: Path
) -> None:
    done = faulty("flip:1:5", recipe, tmp_path, "train.consistency_interval=1").finish()
    assert done.returncode == EXIT_FAULT, done.output()
    line = one_error_line(done)
    assert f"the copies of {PARAMETER} differ after step 5: ranks 0, 1 disagree" in line
    resume(recipe, tmp_path, "train.consistency_interval=1")
    assert_ends_as(tmp_path, reference_run)


@pytest.mark.slow
def test_five_kills_at_random_times_change_no_result(recipe: Path, tmp_path: Path) -> None:
    steps = ["train.steps=250", "evaluation.interval=250"]
    whole = tmp_path / "whole"
    whole.mkdir()
    run_script(TRAIN, *arguments(recipe, whole, *steps), folder=whole, ranks=RANKS)
    moments = random.Random(5)
    job = start(RANKS, *arguments(recipe, tmp_path, *steps), folder=tmp_path, before=(*SUPERVISOR, "--"))
    known: set[int] = set()
    for _ in range(5):
        ranks = wait_for_ranks(job, known)
        known |= set(ranks)
        time.sleep(moments.uniform(0, 0.6))
        psutil.Process(ranks[moments.randrange(RANKS)]).kill()
    done = job.finish()
    assert done.returncode == 0, done.output()
    assert [entry["outcome"] for entry in history(tmp_path)] == ["lost"] * 5 + ["done"]
    assert logged_steps(tmp_path / "run") == logged_steps(whole / "run")


def wait_for_ranks(job: Job, known: set[int]) -> list[int]:
    """Wait for the ranks of a new attempt to be ready to train, and return their process ids."""
    while True:
        heartbeats = read_heartbeats(job.folder / "run/watch").values()
        if len(heartbeats) == RANKS and not any(
            heartbeat.end or heartbeat.process in known for heartbeat in heartbeats
        ):
            return [heartbeat.process for heartbeat in heartbeats]
        assert job.process.poll() is None, (job.folder / "stderr").read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_to_the_supervisor_reaches_the_ranks_and_ends_the_job(recipe: Path, tmp_path: Path) -> None:
    words = arguments(recipe, tmp_path, "train.steps=100000", "evaluation.interval=100000")
    job = start(RANKS, *words, folder=tmp_path, before=(*SUPERVISOR, "--"))
    wait_for_ranks(job, set())
    while not (tmp_path / "run/metrics.jsonl").exists():  # before the first step, there is nothing to save
        assert job.process.poll() is None
        time.sleep(0.02)
    job.process.terminate()
    done = job.finish()
    assert done.returncode == EXIT_SAVED, done.output()
    assert [entry["outcome"] for entry in history(tmp_path)] == ["saved"]
    assert (tmp_path / "run/checkpoints/latest").exists()
    assert_no_process_remains(tmp_path)


@pytest.mark.slow
def test_an_error_that_repeats_at_the_same_step_ends_the_restarts(recipe: Path, tmp_path: Path) -> None:
    job = faulty("error:1:3", recipe, tmp_path, before=(*SUPERVISOR, "--"))
    done = job.finish()
    assert done.returncode != 0
    assert [entry["outcome"] for entry in history(tmp_path)] == ["error"] * 2
    assert "the same error at step 3 as in the attempt before: ZeroDivisionError" in done.stdout
    assert_no_process_remains(tmp_path)
