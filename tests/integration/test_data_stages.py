"""Runs with stages and masked documents equal uninterrupted ones, and changes of the data need permission."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from hypermoe_ds.data.preprocess import Job, preprocess
from hypermoe_ds.errors import EXIT_BAD_INPUT
from tests.helpers.corpus import TokenisedCorpus, write_jsonl
from tests.helpers.jobs import TRAIN, arguments_of, logged_steps, run_script, small_recipe, write_recipe

RANKS = 2


@dataclass(frozen=True)
class Setup:
    """A recipe and its datasets. The documents of the first dataset have only a few tokens."""

    recipe: Path
    short: str
    code: str


@pytest.fixture(scope="module")
def setup(corpus: TokenisedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("stages")
    lines = [line for text in corpus.texts[:8] for line in text.read_text().splitlines() if line.strip()]
    short = str(folder / "short")
    preprocess(Job([str(write_jsonl(folder / "short.jsonl", lines))], str(corpus.tokenizer), short))
    recipe = small_recipe(corpus, folder / "unused")
    both = [{"prefix": short, "weight": 3.0}, {"prefix": corpus.train}]
    recipe["data"] |= {
        "train": [{"prefix": short}],
        "document_mask": True,
        "stages": [{"from_step": 4, "train": both}, {"from_step": 6, "sequence_length": 64}],
    }
    recipe["model"]["max_position_embeddings"] = 64
    return Setup(write_recipe(folder / "recipe.yaml", recipe), short, corpus.train)


def train(setup: Setup, run: Path, *overrides: str, code: int = 0, stage: int = 1) -> str:
    arguments = arguments_of(setup.recipe, f"run.dir={run}", *overrides, stage=stage)
    return run_script(TRAIN, *arguments, folder=run.parent, ranks=RANKS, code=code).output()


@pytest.fixture(scope="module")
def whole(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole_stages") / "run"
    train(setup, run, "parallel.expert=2")
    return run


def test_a_run_resumed_in_every_stage_logs_identical_metrics(setup: Setup, whole: Path, tmp_path: Path) -> None:
    for end in (2, 5, 7, 8):
        train(setup, tmp_path / "run", "parallel.expert=2", f"train.stop_at_step={end}")
    assert logged_steps(tmp_path / "run") == logged_steps(whole)


def test_each_stage_reads_its_datasets_by_weight(setup: Setup, whole: Path) -> None:
    steps = logged_steps(whole)
    tokens = [step["consumed_tokens"] for step in steps]
    assert tokens == [8 * 32 * number for number in range(1, 9)], "the tokens per step stay the same"
    of_code = [step["consumed_tokens/train"] for step in steps]
    assert of_code[2] == 0
    assert of_code[4] == 16 * 32 // 4
    assert of_code[7] == of_code[4] + 12 * 64 // 4


def test_the_samples_of_a_step_are_listed_and_shown(setup: Setup, whole: Path, tmp_path: Path) -> None:
    def inspect(*words: str, run: Path = whole) -> list[str]:
        done = run_script("tools/inspect_data.py", run, *words, folder=tmp_path)
        assert done.returncode == 0, done.output()
        return done.stdout.splitlines()

    steps = {number: inspect("--step", str(number)) for number in (2, 4, 7)}
    assert [line.partition(":")[0] for line in steps[2]] == [f"sample {index}" for index in range(8, 16)]
    assert all(line.endswith(f" of {setup.short}") for line in steps[2])
    assert [line.endswith(f" of {setup.code}") for line in steps[4]].count(True) == 2
    assert [line.partition(":")[0] for line in steps[7]] == [f"sample {index}" for index in range(48, 56, 2)]
    shown = inspect("--sample", "8")
    assert shown[0] == steps[2][0]
    borders = [line for line in shown if line.startswith("--- tokens ")]
    documents = steps[2][0].partition("document ")[2].partition(" of ")[0].split(", ")
    assert len(borders) in (len(documents), len(documents) - 1)  # the last label can belong to one more document
    assert borders[0].startswith("--- tokens 0 to ")
    assert borders[0].endswith(" is ignored")
    done = run_script("tools/inspect_data.py", whole, "--step", 9, folder=tmp_path)
    assert done.returncode == EXIT_BAD_INPUT
    for words, problem in (
        (["--step", 1], f"{tmp_path}: is not the folder of a trained run; give the run.dir of a run"),
        ([], f"{tmp_path}: is a folder; give a prefix, or add --step or --sample for a run folder"),
        (["--verify"], f"--verify: does not apply to {tmp_path}; give a prefix instead of a run folder"),
    ):
        refused = run_script("tools/inspect_data.py", tmp_path, *words, folder=tmp_path)
        assert (refused.returncode, refused.stderr.splitlines()[-1]) == (EXIT_BAD_INPUT, f"error: {problem}")
    assert done.stderr.splitlines()[-1] == f"error: --step 9: {whole} has 8 logged steps; give a step from 1"


def test_evaluation_of_the_run_and_of_its_export_gives_the_validation_loss(
    setup: Setup, whole: Path, corpus: TokenisedCorpus, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    expected = [record["valid_loss"] for record in records if "valid_loss" in record][-1]
    run_script("tools/convert_to_hf.py", "--checkpoint", whole, "--output", "hf", folder=tmp_path)
    assert "| documents | masked: " in (tmp_path / "hf/README.md").read_text()
    of_export = ["--checkpoint", tmp_path / "hf", "--sequence-length", 32]
    for arguments, same in (
        (["--checkpoint", whole], True),
        ([*of_export, "--document-mask"], True),
        (of_export, False),
    ):
        done = run_script("pretrain/evaluate.py", *arguments, "--data", setup.short, folder=tmp_path)
        masked = float(re.search(r"^loss ([\d.]+)", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
        assert ("documents masked" in done.stdout) == same
        if same:
            short = masked
    assert masked != pytest.approx(short, abs=1e-3), "without the mask, the loss differs"
    done = run_script("pretrain/evaluate.py", "--checkpoint", whole, "--data", corpus.valid, folder=tmp_path)
    assert float(re.search(r"^loss ([\d.]+)", done.stdout, re.MULTILINE)[1]) == pytest.approx(expected, abs=2e-6)  # type: ignore[index]


def test_changed_data_are_refused_and_continued_on_request(setup: Setup, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(setup, run, "data.stages=[]", "train.stop_at_step=2")
    other = f"data.train=[{{prefix: {setup.short}}}, {{prefix: {setup.code}}}]"
    refused = train(setup, run, "data.stages=[]", other, "train.stop_at_step=3", code=EXIT_BAD_INPUT)
    assert re.search(
        r"^error: data\.on_change=refuse: .*: the datasets of data\.train or their content; .*continue", refused, re.M
    )
    train(setup, run, "data.stages=[]", other, "train.stop_at_step=3", "data.on_change=continue")
    train(setup, run, "data.stages=[]", other, "train.stop_at_step=4")
    assert [step["consumed_tokens/train"] for step in logged_steps(run)[2:]] == [4 * 32, 8 * 32]
    done = run_script("tools/inspect_data.py", run, "--step", 1, folder=tmp_path)
    assert done.stderr.splitlines()[-1].endswith(
        "sample 0: is not one of the samples 16 to 63; the data settings changed at sample 16; "
        "give the index of another sample"
    )
