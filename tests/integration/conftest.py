"""A tokenised corpus and finished runs that the tests of whole jobs share."""

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
    """With little to validate on."""
    folder = tmp_path_factory.mktemp("corpus")
    whole = tokenised_corpus(folder, vocab_size=500)
    small = replace(whole, valid=str(folder / "small"))
    preprocess(Job([str(whole.texts[0])], str(whole.tokenizer), small.valid))
    return small


@pytest.fixture(scope="session")
def recipe(corpus: TokenisedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "recipe.yaml", small_recipe(corpus, folder / "unused"))


@pytest.fixture(scope="session")
def whole_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on two ranks, through the launcher, without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch(RANKS, *arguments_of(recipe, f"run.dir={folder / 'run'}", EP), folder=folder)
    assert done.returncode == 0, done.told()
    return folder / "run"


@pytest.fixture(scope="session")
def stopped_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after 5 steps and resumed where the checkpoint of step 4 was the last whole one."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    arguments = arguments_of(recipe, f"run.dir={run}", EP)
    run_script(RECORDED_TRAIN, *arguments, "train.stop_at_step=5", folder=run.parent, ranks=RANKS)
    (run / "checkpoints" / "latest").write_text("step_00000004")
    run_script(RECORDED_TRAIN, *arguments, folder=run.parent, ranks=RANKS)
    return run


@pytest.fixture(scope="session")
def moved_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, begun on two ranks under ZeRO-1, gone on with alone under ZeRO-3 and ended on two ranks again."""
    run = tmp_path_factory.mktemp("moved") / "run"
    run_script(
        RECORDED_TRAIN,
        *arguments_of(recipe, f"run.dir={run}", EP, "train.stop_at_step=3"),
        folder=run.parent,
        ranks=RANKS,
    )
    alone = run_script(
        RECORDED_TRAIN, *arguments_of(recipe, f"run.dir={run}", "train.stop_at_step=6", stage=3), folder=run.parent
    )
    assert alone.returncode == 0, alone.told()
    run_script(RECORDED_TRAIN, *arguments_of(recipe, f"run.dir={run}", EP, stage=2), folder=run.parent, ranks=RANKS)
    return run


@pytest.fixture(scope="session")
def zero3_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps under ZeRO-3, top-1 routing, untied embeddings."""
    run = tmp_path_factory.mktemp("zero3") / "run"
    overrides = ["train.steps=4", "model.num_experts_per_tok=1", "model.tie_word_embeddings=false"]
    arguments = arguments_of(recipe, f"run.dir={run}", EP, *overrides, stage=3)
    run_script(TRAIN, *arguments, folder=run.parent, ranks=RANKS)
    return run
