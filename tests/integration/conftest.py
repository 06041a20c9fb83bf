"""Share a tokenised corpus and finished runs among the integration tests."""

from dataclasses import replace
from pathlib import Path

import pytest

from hypermoe_ds.data.preprocess import Job, preprocess
from tests.helpers.corpus import TokenisedCorpus, tokenised_corpus
from tests.helpers.jobs import RECORDED_TRAIN, TRAIN, arguments_of, launch, run_script, small_recipe, write_recipe

RANKS = 2
EP = f"parallel.expert={RANKS}"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenisedCorpus:
    """Tokenise the corpus, with one file as validation data to keep validation short."""
    folder = tmp_path_factory.mktemp("corpus")
    full = tokenised_corpus(folder, vocab_size=500)
    small = replace(full, valid=str(folder / "small"))
    preprocess(Job([str(full.texts[0])], str(full.tokenizer), small.valid))
    return small


@pytest.fixture(scope="session")
def recipe(corpus: TokenisedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "recipe.yaml", small_recipe(corpus, folder / "unused"))


@pytest.fixture(scope="session")
def reference_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 8 steps on two ranks through the launcher, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch(RANKS, *arguments_of(recipe, f"run.dir={folder / 'run'}", EP), folder=folder)
    assert done.returncode == 0, done.output()
    return folder / "run"


@pytest.fixture(scope="session")
def stopped_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same run as `reference_run`, but stop it after step 5 and resume from the checkpoint of step 4."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    arguments = arguments_of(recipe, f"run.dir={run}", EP)
    run_script(RECORDED_TRAIN, *arguments, "train.stop_at_step=5", folder=run.parent, ranks=RANKS)
    (run / "checkpoints" / "latest").write_text("step_00000004")
    run_script(RECORDED_TRAIN, *arguments, folder=run.parent, ranks=RANKS)
    return run


@pytest.fixture(scope="session")
def moved_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same run as `reference_run` under three layouts, one after another.

    The layouts are two ranks with ZeRO 1, one rank with ZeRO 3, and two ranks with ZeRO 2.
    """
    run = tmp_path_factory.mktemp("moved") / "run"
    run_script(
        RECORDED_TRAIN,
        *arguments_of(recipe, f"run.dir={run}", EP, "train.stop_at_step=3"),
        folder=run.parent,
        ranks=RANKS,
    )
    one_rank = run_script(
        RECORDED_TRAIN, *arguments_of(recipe, f"run.dir={run}", "train.stop_at_step=6", stage=3), folder=run.parent
    )
    assert one_rank.returncode == 0, one_rank.output()
    run_script(RECORDED_TRAIN, *arguments_of(recipe, f"run.dir={run}", EP, stage=2), folder=run.parent, ranks=RANKS)
    return run


@pytest.fixture(scope="session")
def zero3_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 4 steps with ZeRO 3, top-1 routing and untied embeddings."""
    run = tmp_path_factory.mktemp("zero3") / "run"
    overrides = ["train.steps=4", "model.num_experts_per_tok=1", "model.tie_word_embeddings=false"]
    arguments = arguments_of(recipe, f"run.dir={run}", EP, *overrides, stage=3)
    run_script(TRAIN, *arguments, folder=run.parent, ranks=RANKS)
    return run
