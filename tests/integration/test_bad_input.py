"""Bad input to the training command: one line that names key, value and remedy, and nothing written."""

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
    Done,
    arguments_of,
    launch,
    run_here,
    run_script,
    small_recipe,
    write_recipe,
)
from tests.helpers.ranks import process_group, run_in_processes


@dataclass
class Place:
    """What a bad job finds."""

    folder: Path
    corpus: TokenisedCorpus
    other_run: Path
    lock: RunLock | None = None

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


@dataclass(frozen=True)
class Bad:
    """A mistake.

    Attributes:
        says: parts of the line that tells it.
        overrides: of the recipe; FOLDER and OTHER are filled in.
        ds_json: the DeepSpeed file.
        prepare: makes what the overrides name.
        free_bytes: what the disk claims to have left.
    """

    says: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    ds_json: object = field(default_factory=lambda: {"zero_optimization": {"stage": 1}})
    prepare: Callable[[Place], None] | None = None
    free_bytes: int | None = None


def truncated_data(place: Place) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{place.corpus.train}{suffix}", place.folder / f"cut{suffix}")
    with (place.folder / "cut.bin").open("r+b") as file:
        file.truncate(1000)


def large_ids(place: Place) -> None:
    write_token_files(str(place.folder / "large"), [[1, 2, 599] * 40])


def a_file(place: Place) -> None:
    (place.folder / "file").touch()


def lock_of_another_job(place: Place) -> None:
    """Held by this process, the job is another one."""
    place.lock = RunLock(place.other_run)


CASES = {
    "unknown key": Bad(("error: train.step: unknown key", "did you mean 'steps'?"), ("train.step=3",)),
    "unknown section": Bad(("error: optimiser: unknown key", "did you mean 'optimizer'?"), ("optimiser.lr=3",)),
    "wrong type": Bad(("train.steps='many': is not valid",), ("train.steps=many",)),
    "unknown DeepSpeed key": Bad(
        ("ds.json: zero_optimizaton: unknown key", "did you mean 'zero_optimization'?"),
        ds_json={"zero_optimizaton": {"stage": 1}},
    ),
    "stated twice": Bad(
        ("ds.json: gradient_clipping: belongs to the recipe", "set train.clip_grad_norm"),
        ds_json={"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0},
    ),
    "no JSON": Bad(("ds.json: is not JSON", "start from ds_configs/zero1.json"), ds_json=None),
    "experts do not divide": Bad(
        ("parallel.expert=3: does not divide model.num_experts=4", "choose 1"), ("parallel.expert=3",)
    ),
    "ranks do not divide": Bad(
        ("parallel.expert=2: does not divide the number of ranks, 1", "choose 1"), ("parallel.expert=2",)
    ),
    "more experts chosen than there are": Bad(
        ("model.num_experts_per_tok=5: more than num_experts=4", "choose 1 to 4"), ("model.num_experts_per_tok=5",)
    ),
    "batches do not divide": Bad(
        (
            "train.micro_batch_size=2: times 1 ranks does not divide train.global_batch_size=7",
            "these micro-batches fit: 1, 7",
        ),
        ("train.global_batch_size=7",),
    ),
    "vocabulary too small": Bad(
        ("has token ids up to 499 and the model 64 embeddings", "set model.vocab_size to 500 or more"),
        ("model.vocab_size=64",),
    ),
    "token ids beyond the vocabulary": Bad(
        ("large: has 600 token ids and the model 512", "set model.vocab_size to 600 or more"),
        ("data.train=[{prefix: FOLDER/large}]",),
        prepare=large_ids,
    ),
    "no data": Bad(("none.idx: no such file",), ("data.valid=[{prefix: FOLDER/none}]",)),
    "truncated data": Bad(
        ("cut.bin: is truncated (1000 bytes instead of", "run tools/preprocess_data.py again"),
        ("data.train=[{prefix: FOLDER/cut}]",),
        prepare=truncated_data,
    ),
    "no tokenizer": Bad(("none: no such tokenizer folder", "give a folder with"), ("data.tokenizer=FOLDER/none",)),
    "another model's run": Bad(
        ("model.adapter_size=4: ", "has another model (there it is 8)", "choose another run.dir"),
        ("run.dir=OTHER", "model.adapter_size=4"),
    ),
    "a run that another job trains": Bad(
        ("run.dir=", "is training in it; end that job or choose another run.dir"),
        ("run.dir=OTHER",),
        prepare=lock_of_another_job,
    ),
    "a run that is there already": Bad(
        ("checkpoints: has checkpoints", "set checkpoint.resume=auto"), ("run.dir=OTHER", "checkpoint.resume=none")
    ),
    "full disk": Bad(("GiB are free and a checkpoint needs", "choose another run.dir"), free_bytes=1000),
    "run folder that cannot be": Bad(("file/run: cannot be written",), ("run.dir=FOLDER/file/run",), prepare=a_file),
    "sequences too long": Bad(
        ("data.sequence_length=64: longer than model.max_position_embeddings=32",), ("data.sequence_length=64",)
    ),
}


def start(case: Bad, place: Place, launched_ranks: int | None = None) -> Done:
    if case.prepare is not None:
        case.prepare(place)
    recipe = write_recipe(place.folder / "recipe.yaml", small_recipe(place.corpus, place.run_dir))
    ds_json = place.folder / "ds.json"
    ds_json.write_text("{" if case.ds_json is None else json.dumps(case.ds_json))
    filled = [
        text.replace("FOLDER", str(place.folder)).replace("OTHER", str(place.other_run)) for text in case.overrides
    ]
    arguments = ["--config", recipe, "--deepspeed_config", ds_json, *filled]
    if launched_ranks is not None:
        return launch(launched_ranks, *arguments, folder=place.folder)
    return run_script(TRAIN, *arguments, folder=place.folder, free_bytes=case.free_bytes)


@pytest.fixture
def place(tmp_path: Path, corpus: TokenisedCorpus, finished: Path) -> Place:
    return Place(tmp_path, corpus, finished)


@pytest.fixture(scope="module")
def finished(corpus: TokenisedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on one rank."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder / "recipe.yaml", small_recipe(corpus, folder / "run"))
    overrides = ["train.steps=1", "schedule.warmup_steps=0"]
    done = run_script(TRAIN, *arguments_of(recipe, *overrides), folder=folder)
    assert done.returncode == 0, done.told()
    return folder / "run"


def contents(folder: Path) -> dict[Path, float]:
    """All files except the lock, the ranks' heartbeats and their logs."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and path.parent.name not in ("watch", "logs")
    ]
    return {path: path.stat().st_mtime_ns for path in files}


def assert_told_once(done: Done, says: tuple[str, ...]) -> None:
    assert done.returncode != 0
    told = [line for line in done.told().splitlines() if "error:" in line]
    assert len(told) == 1, done.told()
    assert told[0].startswith("error: ")
    for part in says:
        assert part in told[0]
    assert "Traceback" not in done.told()


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_with_one_line_and_nothing_written(name: str, place: Place) -> None:
    before = contents(place.other_run)
    done = start(CASES[name], place)
    assert_told_once(done, CASES[name].says)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert contents(place.run_dir) == {}
    assert contents(place.other_run) == before


ON_TWO_RANKS = {
    "an unknown key": CASES["unknown key"],
    "ZeRO off under expert parallelism": Bad(
        ("zero_optimization.stage=0: is not supported", "set it to 1, 2 or 3"),
        ("parallel.expert=2",),
        ds_json={},
    ),
}


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_tell_a_mistake_once(name: str, place: Place) -> None:
    done = start(ON_TWO_RANKS[name], place, launched_ranks=2)
    assert_told_once(done, ON_TWO_RANKS[name].says)
    assert contents(place.run_dir) == {}


def train_with_own_steps(folder: Path, *arguments: str) -> Done:
    """The training command, with other steps on each rank."""
    steps = 8 + 4 * int(os.environ["RANK"])
    return run_here(REPOSITORY / TRAIN, [*arguments, f"train.steps={steps}"], folder)


def test_two_hosts_with_other_overrides_are_told_and_nothing_is_written(place: Place) -> None:
    recipe = write_recipe(place.folder / "recipe.yaml", small_recipe(place.corpus, place.run_dir))
    with process_group(2) as environments:
        alone = [environment | {"LOCAL_RANK": "0"} for environment in environments]
        hosts = run_in_processes(alone, train_with_own_steps, place.folder, *arguments_of(recipe))
    for done in hosts:
        assert_told_once(done, ("train.steps: is 8 on rank 0 and 12 on rank 1 (", "give all ranks the same settings"))
        assert done.returncode == 2
    assert contents(place.run_dir) == {}
