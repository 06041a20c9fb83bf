"""On bad input, the training command prints one line with key, value and remedy, and writes no files."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hypermoe_ds.checkpoint.lock import RunLock
from tests.helpers.corpus import TokenisedCorpus, write_token_files
from tests.helpers.jobs import (
    REPOSITORY,
    TRAIN,
    CompletedRun,
    arguments_of,
    launch,
    run_here,
    run_script,
    small_recipe,
    write_recipe,
)
from tests.helpers.ranks import process_group, run_in_processes


@dataclass
class Files:
    """Files and folders that a case uses."""

    folder: Path
    corpus: TokenisedCorpus
    other_run: Path
    lock: RunLock | None = None

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


@dataclass(frozen=True)
class BadInput:
    """A case of bad input.

    Attributes:
        message: parts of the error message.
        overrides: overrides of the recipe; the test replaces FOLDER and OTHER with paths.
        ds_json: content of the DeepSpeed JSON; None writes invalid JSON.
        prepare: function that creates the files named in the overrides.
        free_bytes: free disk space to simulate, in bytes; None uses the real value.
    """

    message: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    ds_json: object = field(default_factory=lambda: {"zero_optimization": {"stage": 1}})
    prepare: Callable[[Files], None] | None = None
    free_bytes: int | None = None


def truncated_data(files: Files) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{files.corpus.train}{suffix}", files.folder / f"cut{suffix}")
    with (files.folder / "cut.bin").open("r+b") as file:
        file.truncate(1000)


def large_ids(files: Files) -> None:
    write_token_files(str(files.folder / "large"), [[1, 2, 599] * 40])


def a_file(files: Files) -> None:
    (files.folder / "file").touch()


def lock_of_another_job(files: Files) -> None:
    """Lock the other run in this process, so that the job finds the run in use."""
    files.lock = RunLock(files.other_run)


CASES = {
    "unknown key": BadInput(("error: train.step: unknown key", "did you mean 'steps'?"), ("train.step=3",)),
    "unknown section": BadInput(("error: optimiser: unknown key", "did you mean 'optimizer'?"), ("optimiser.lr=3",)),
    "wrong type": BadInput(("train.steps='many': is not valid",), ("train.steps=many",)),
    "unknown DeepSpeed key": BadInput(
        ("ds.json: zero_optimizaton: unknown key", "did you mean 'zero_optimization'?"),
        ds_json={"zero_optimizaton": {"stage": 1}},
    ),
    "setting of the recipe": BadInput(
        ("ds.json: gradient_clipping: belongs to the recipe", "set train.clip_grad_norm"),
        ds_json={"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0},
    ),
    "invalid JSON": BadInput(("ds.json: is not JSON", "start from ds_configs/zero1.json"), ds_json=None),
    "experts do not divide": BadInput(
        ("parallel.expert=3: does not divide model.num_experts=4", "choose 1"), ("parallel.expert=3",)
    ),
    "ranks do not divide": BadInput(
        ("parallel.expert=2: does not divide the number of ranks, 1", "choose 1"), ("parallel.expert=2",)
    ),
    "more selected experts than experts": BadInput(
        ("model.num_experts_per_tok=5: more than num_experts=4", "choose 1 to 4"), ("model.num_experts_per_tok=5",)
    ),
    "batches do not divide": BadInput(
        (
            "train.micro_batch_size=2: multiplied by 1 ranks, it does not divide train.global_batch_size=7",
            "choose one of 1, 7",
        ),
        ("train.global_batch_size=7",),
    ),
    "vocabulary too small": BadInput(
        ("has token ids up to 499, but the model has 64 embeddings", "set model.vocab_size to 500 or more"),
        ("model.vocab_size=64",),
    ),
    "token ids beyond the vocabulary": BadInput(
        ("large: has token ids up to 599, but the model has 512", "set model.vocab_size to 600 or more"),
        ("data.train=[{prefix: FOLDER/large}]",),
        prepare=large_ids,
    ),
    "no data": BadInput(("none.idx: no such file",), ("data.valid=[{prefix: FOLDER/none}]",)),
    "truncated data": BadInput(
        ("cut.bin: is truncated (1000 bytes instead of", "run tools/preprocess_data.py again"),
        ("data.train=[{prefix: FOLDER/cut}]",),
        prepare=truncated_data,
    ),
    "no tokenizer": BadInput(("none: no such tokenizer folder", "give a folder with"), ("data.tokenizer=FOLDER/none",)),
    "another model's run": BadInput(
        ("model.adapter_size=4: ", "differs from 8 in the run folder", "choose another run.dir"),
        ("run.dir=OTHER", "model.adapter_size=4"),
    ),
    "run that another job trains": BadInput(
        ("run.dir=", "is training in it; end that job or choose another run.dir"),
        ("run.dir=OTHER",),
        prepare=lock_of_another_job,
    ),
    "existing run without resume": BadInput(
        ("checkpoints: has checkpoints", "set checkpoint.resume=auto"), ("run.dir=OTHER", "checkpoint.resume=none")
    ),
    "full disk": BadInput(("GiB are free, but a checkpoint needs", "choose another run.dir"), free_bytes=1000),
    "run folder inside a file": BadInput(
        ("file/run: cannot be written",), ("run.dir=FOLDER/file/run",), prepare=a_file
    ),
    "sequences too long": BadInput(
        ("data.sequence_length=64: is longer than model.max_position_embeddings=32",), ("data.sequence_length=64",)
    ),
}


def start(bad: BadInput, files: Files, launched_ranks: int | None = None) -> CompletedRun:
    if bad.prepare is not None:
        bad.prepare(files)
    recipe = write_recipe(files.folder / "recipe.yaml", small_recipe(files.corpus, files.run_dir))
    ds_json = files.folder / "ds.json"
    ds_json.write_text("{" if bad.ds_json is None else json.dumps(bad.ds_json))
    filled = [
        text.replace("FOLDER", str(files.folder)).replace("OTHER", str(files.other_run)) for text in bad.overrides
    ]
    arguments = ["--config", recipe, "--deepspeed_config", ds_json, *filled]
    if launched_ranks is not None:
        return launch(launched_ranks, *arguments, folder=files.folder)
    return run_script(TRAIN, *arguments, folder=files.folder, free_bytes=bad.free_bytes)


@pytest.fixture
def files(tmp_path: Path, corpus: TokenisedCorpus, finished: Path) -> Files:
    return Files(tmp_path, corpus, finished)


@pytest.fixture(scope="module")
def finished(corpus: TokenisedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one step on one rank, and return the run folder."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder / "recipe.yaml", small_recipe(corpus, folder / "run"))
    overrides = ["train.steps=1", "schedule.warmup_steps=0"]
    done = run_script(TRAIN, *arguments_of(recipe, *overrides), folder=folder)
    assert done.returncode == 0, done.output()
    return folder / "run"


def contents(folder: Path) -> dict[Path, float]:
    """Return the modification times of all files except the lock, heartbeats and logs."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and path.parent.name not in ("watch", "logs")
    ]
    return {path: path.stat().st_mtime_ns for path in files}


def assert_one_error(done: CompletedRun, message: tuple[str, ...]) -> None:
    assert done.returncode != 0
    errors = [line for line in done.output().splitlines() if "error:" in line]
    assert len(errors) == 1, done.output()
    assert errors[0].startswith("error: ")
    for part in message:
        assert part in errors[0]
    assert "Traceback" not in done.output()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_prints_one_line_and_writes_nothing(name: str, files: Files) -> None:
    before = contents(files.other_run)
    done = start(CASES[name], files)
    assert_one_error(done, CASES[name].message)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert contents(files.run_dir) == {}
    assert contents(files.other_run) == before


ON_TWO_RANKS = {
    "an unknown key": CASES["unknown key"],
    "ZeRO off under expert parallelism": BadInput(
        ("zero_optimization.stage=0: is not supported", "set it to 1, 2 or 3"),
        ("parallel.expert=2",),
        ds_json={},
    ),
}


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_report_bad_input_once(name: str, files: Files) -> None:
    done = start(ON_TWO_RANKS[name], files, launched_ranks=2)
    assert_one_error(done, ON_TWO_RANKS[name].message)
    assert contents(files.run_dir) == {}


def train_with_own_steps(folder: Path, *arguments: str) -> CompletedRun:
    """Run the training command with a different number of steps on each rank."""
    steps = 8 + 4 * int(os.environ["RANK"])
    return run_here(REPOSITORY / TRAIN, [*arguments, f"train.steps={steps}"], folder)


def test_different_overrides_on_two_hosts_are_reported_and_nothing_is_written(files: Files) -> None:
    recipe = write_recipe(files.folder / "recipe.yaml", small_recipe(files.corpus, files.run_dir))
    with process_group(2) as environments:
        separate = [environment | {"LOCAL_RANK": "0"} for environment in environments]
        hosts = run_in_processes(separate, train_with_own_steps, files.folder, *arguments_of(recipe))
    for done in hosts:
        assert_one_error(done, ("train.steps: is 8 on rank 0 and 12 on rank 1 (", "give all ranks the same settings"))
        assert done.returncode == 2
    assert contents(files.run_dir) == {}
