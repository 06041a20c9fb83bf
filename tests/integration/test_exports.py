"""An exported model gives the same results in an environment without this project."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.weights import load_model
from tests.helpers.corpus import TokenisedCorpus
from tests.helpers.jobs import CompletedRun, run_script

# This script loads each folder without access to this project, and saves the logits of token ids read from a file.
SCRIPT_WITHOUT_PROJECT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hypermoe_ds":
            raise ImportError(name + " is absent")

sys.meta_path.insert(0, Absent())
try:
    import hypermoe_ds
except ImportError:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

ids = torch.load("ids.pt")
for number, folder in enumerate(sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        seen = {"logits": model(ids).logits, "ids": tokenizer("def f(x):\\n\\treturn x")["input_ids"]}
    torch.save(seen, f"{number}.pt")
"""
PRECISE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="session")
def exported(reference_run: Path, zero3_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Export each run, and return the Hugging Face folder of each."""
    folder = tmp_path_factory.mktemp("exported")
    result = {}
    for name, run in (("whole", reference_run), ("zero3", zero3_run)):
        done = run_script("tools/convert_to_hf.py", "--checkpoint", run, "--output", name, folder=folder)
        assert done.returncode == 0, done.output()
        parameters = RunFolder(run).model_config().parameter_counts().total
        assert done.stdout.splitlines() == [f"{name}: {parameters / 1e6:,.1f} M parameters in float32"]
        result[run] = folder / name
    assert sorted(path.name for path in folder.iterdir()) == ["whole", "zero3"]
    return result


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    return torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def outputs_without_project(
    exported: dict[Path, Path], token_ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, dict[str, object]]:
    """Compute logits and token ids in a process that cannot import this project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.save(token_ids, folder / "ids.pt")
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_WITHOUT_PROJECT, *map(str, exported.values())],
        cwd=folder, env=inherited | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {run: torch.load(folder / f"{number}.pt") for number, run in enumerate(exported)}


@pytest.fixture(params=["reference_run", "zero3_run"])
def run(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_without_this_project_an_export_gives_the_logits_of_the_trained_model(
    run: Path, outputs_without_project: dict[Path, dict[str, Tensor]], token_ids: Tensor
) -> None:
    with torch.no_grad():
        logits = load_model(RunFolder(run))(input_ids=token_ids).logits
    torch.testing.assert_close(outputs_without_project[run]["logits"], logits, **PRECISE)


def test_the_tokenizer_of_an_export_gives_the_token_ids_of_training(
    run: Path, outputs_without_project: dict[Path, dict[str, object]], corpus: TokenisedCorpus
) -> None:
    expected = AutoTokenizer.from_pretrained(corpus.tokenizer)("def f(x):\n\treturn x")["input_ids"]
    assert outputs_without_project[run]["ids"] == expected


def printed_loss(done: CompletedRun) -> float:
    assert done.returncode == 0, done.output()
    match = re.search(r"^loss ([\d.]+) \| perplexity ([\d.]+) \| .+ \| ([\d,]+) tokens of ", done.stdout, re.MULTILINE)
    assert match is not None, done.stdout
    return float(match[1])


def test_evaluating_a_run_or_its_export_gives_the_last_validation_loss(
    run: Path, exported: dict[Path, Path], corpus: TokenisedCorpus, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [record["valid_loss"] for record in records if "valid_loss" in record][-1]
    for checkpoint in (run, exported[run]):
        done = run_script(
            "pretrain/evaluate.py", "--checkpoint", checkpoint, "--data", corpus.valid, folder=tmp_path
        )  # fmt: skip
        assert printed_loss(done) == pytest.approx(expected, abs=2e-6)


def test_an_earlier_step_is_evaluated_and_exported_on_request(
    reference_run: Path, exported: dict[Path, Path], corpus: TokenisedCorpus, tmp_path: Path
) -> None:
    data = ["--data", corpus.valid]
    run_script("tools/convert_to_hf.py", "--checkpoint", reference_run, "--step", 6, "--output", "hf", folder=tmp_path)
    earlier = run_script("pretrain/evaluate.py", "--checkpoint", reference_run, "--step", 6, *data, folder=tmp_path)
    of_export = run_script("pretrain/evaluate.py", "--checkpoint", "hf", *data, folder=tmp_path)
    newest = run_script("pretrain/evaluate.py", "--checkpoint", reference_run, *data, folder=tmp_path)
    assert printed_loss(earlier) == printed_loss(of_export) != printed_loss(newest)


def test_generated_text_continues_the_prompt_and_depends_on_the_seed(
    reference_run: Path, exported: dict[Path, Path], tmp_path: Path
) -> None:
    def generate(*arguments: object) -> str:
        common = ["--checkpoint", exported[reference_run], "--prompt", "def read(path):", "--max-new-tokens", 12]
        done = run_script("tools/generate.py", *common, *arguments, folder=tmp_path)
        assert done.returncode == 0, done.output()
        return done.stdout

    texts = [generate("--seed", seed) for seed in (1, 1, 2)]
    assert all(text.startswith("def read(path):") for text in texts)
    assert texts[0] == texts[1] != texts[2]
    likeliest = generate("--temperature", 0, "--seed", 1)
    assert likeliest == generate("--temperature", 0, "--seed", 2)
    assert likeliest == generate("--checkpoint", reference_run, "--temperature", 0)


BAD = {
    "no run": ("tools/convert_to_hf.py --checkpoint EMPTY --output new", "is not a run folder"),
    "no such step": ("tools/convert_to_hf.py --checkpoint RUN --step 3 --output new", "choose a saved step: 6, 8"),
    "output taken": ("tools/convert_to_hf.py --checkpoint RUN --output HF", "exists already; remove it"),
    "nothing to evaluate": (
        "pretrain/evaluate.py --checkpoint EMPTY --data VALID",
        "is neither a run folder nor a Hugging Face folder",
    ),
    "no data": ("pretrain/evaluate.py --checkpoint RUN --data none", "none.idx: no such file"),
    "no template": (
        "tools/convert_to_hf.py --checkpoint RUN --output new --chat-template none",
        "--chat-template=none: cannot be read",
    ),
    "no model": (
        "tools/generate.py --checkpoint EMPTY --prompt a",
        "is neither a run folder nor a Hugging Face folder",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_prints_one_line_and_writes_nothing(
    name: str, reference_run: Path, exported: dict[Path, Path], corpus: TokenisedCorpus, tmp_path: Path
) -> None:
    (tmp_path / "EMPTY").mkdir()
    places = {"RUN": str(reference_run), "HF": str(exported[reference_run]), "VALID": corpus.valid}
    script, *arguments = [places.get(word, word) for word in BAD[name][0].split()]
    done = run_script(script, *arguments, folder=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert BAD[name][1] in line
    assert [path.name for path in tmp_path.iterdir()] == ["EMPTY"]


def test_an_export_to_a_full_disk_prints_one_line_and_writes_nothing(reference_run: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", reference_run, "--output", "hf"]
    done = run_script("tools/convert_to_hf.py", *arguments, folder=tmp_path, free_bytes=1000)
    assert done.returncode == 2
    assert re.fullmatch(r"error: hf: needs [\d.]+ GiB, but 0.00 GiB are free; free disk space\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
