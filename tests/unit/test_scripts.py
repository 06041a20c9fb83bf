"""The shell and Python scripts print their usage, report errors in one line and pass arguments on."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
PYTHON_SCRIPTS = sorted(p for folder in ("pretrain", "tools") for p in (REPOSITORY / folder).glob("*.py"))
PYTHON_SCRIPTS += [REPOSITORY / "launch/supervise.py", REPOSITORY / "benchmarks/compare_losses.py"]
BENCHMARKS = [REPOSITORY / "benchmarks" / f"{name}.py" for name in ("overlap", "train_step")]
COMMANDS = ["bash", "basename", "cat", "dirname", "grep", "head", "ls", "mkdir", "paste", "sed", "sha256sum"]
COMMANDS += ["sort", "tail", "tr"]
CHECKS = ("ruff", "mypy", "shellcheck", "hadolint", "python")


def run(*command: str | Path, cwd: str | Path = "/", **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "HYPERMOE_VENV" and not k.startswith("GIT_")}
    return subprocess.run(
        list(map(str, command)),
        env=inherited | environment,
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def executable(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """Create a PATH folder with shell tools but without Python or a C++ compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for command in COMMANDS:
        found = shutil.which(command)
        assert found is not None, command
        (folder / command).symlink_to(found)
    return folder


# launch/setup.sh


def setup(path: Path, venv: Path, *extras: str, repository: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    operators = str(venv.parent / "operators")
    environment = {"PATH": str(path), "HYPERMOE_VENV": str(venv), "TORCH_EXTENSIONS_DIR": operators}
    return run("bash", repository / "launch/setup.sh", *extras, **environment)


def test_setup_reports_each_missing_dependency_in_one_line_with_a_remedy(bare_path: Path, tmp_path: Path) -> None:
    result = setup(bare_path, tmp_path / "venv")
    python, compiler = result.stderr.splitlines()
    assert "missing Python" in python
    assert "apt-get install python3" in python
    assert "missing the C++ compiler" in compiler
    assert "apt-get install g++" in compiler
    assert result.returncode == 1
    assert not (tmp_path / "venv").exists()


def test_setup_with_python_reports_only_the_missing_compiler(bare_path: Path, tmp_path: Path) -> None:
    (bare_path / "python3.11").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    result = setup(bare_path, tmp_path / "venv")
    assert ["C++ compiler" in line for line in result.stderr.splitlines()] == [True]
    assert result.returncode == 1


def test_setup_refuses_an_unknown_extra(bare_path: Path, tmp_path: Path) -> None:
    result = setup(bare_path, tmp_path / "venv", "dev", "gpus")
    assert result.stderr == "setup: unknown extra 'gpus'; choose from bench, dev, eval, gpu, mpi\n"
    assert result.returncode == 1


def test_setup_does_not_change_a_folder_that_is_not_a_virtual_environment(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    result = run("bash", REPOSITORY / "launch/setup.sh", HYPERMOE_VENV=str(tmp_path))
    assert "is not a virtual environment" in result.stderr
    assert result.returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def fake_environment(tmp_path: Path, repository: Path, extras: str) -> Path:
    """Create a folder that setup.sh accepts as its virtual environment, with a stub for the Python interpreter."""
    venv = tmp_path / "venv"
    executable(venv / "bin" / "python", 'case "$*" in "-VV") echo Python 3.11;; *version_info*) ;; *) exit 9;; esac')
    stamped = f"Python 3.11\n{extras} {repository}\n".encode()
    stamped += b"".join(
        (repository / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "launch/setup.sh")
    )
    (venv / "hypermoe-setup.stamp").write_text(f"{extras}\n{hashlib.sha256(stamped).hexdigest()}  -\n")
    (venv / "pyvenv.cfg").touch()
    operator = tmp_path / "operators" / "deepspeed_shm_comm"
    operator.mkdir(parents=True)
    (operator / "deepspeed_shm_comm.so").touch()
    return venv


@pytest.mark.parametrize("extras", [(), ("dev",), ("mpi", "dev")])
def test_a_second_setup_changes_nothing_and_keeps_earlier_extras(
    bare_path: Path, tmp_path: Path, extras: tuple[str, ...]
) -> None:
    venv = fake_environment(tmp_path, REPOSITORY, "dev,mpi")
    result = setup(bare_path, venv, *extras)
    assert result.stdout == f"setup: ready with dev,mpi; use it with: source {venv}/bin/activate\n", result.stderr
    assert result.returncode == 0


def test_setup_installs_again_after_a_dependency_changes(bare_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "launch").mkdir(parents=True)
    shutil.copy(REPOSITORY / "launch/setup.sh", copy / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, copy)
    venv = fake_environment(tmp_path, copy, "dev")
    assert setup(bare_path, venv, repository=copy).returncode == 0
    with (copy / "pyproject.toml").open("a") as file:
        file.write("# one more dependency\n")
    result = setup(bare_path, venv, repository=copy)
    assert "missing" in result.stderr  # setup looked for a compiler, which is not on this PATH
    assert result.returncode == 1


# --help


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("script", ["setup.sh", "quickstart.sh"])
def test_help_prints_the_usage_without_running_setup(bare_path: Path, tmp_path: Path, script: str, option: str) -> None:
    variables = {"PATH": str(bare_path), "HYPERMOE_VENV": str(tmp_path / "new" / "venv")}
    result = run("bash", REPOSITORY / "launch" / script, option, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: bash launch/{script} [")
    assert "#" not in result.stdout
    assert "set -e" not in result.stdout
    assert not (tmp_path / "new").exists()


def test_quickstart_refuses_an_unknown_option_before_setup(bare_path: Path, tmp_path: Path) -> None:
    variables = {"PATH": str(bare_path), "HYPERMOE_VENV": str(tmp_path / "new" / "venv")}
    result = run("bash", REPOSITORY / "launch/quickstart.sh", "train.steps=3", "--num_gpus", "1", **variables)
    assert (result.returncode, result.stderr) == (2, "quickstart.sh: --num_gpus: is not an option; see --help\n")
    assert not (tmp_path / "new").exists()


# tests/run.sh


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Create a repository with tests/run.sh and stubs for setup and the checks, which record their arguments."""
    (tmp_path / "tests").mkdir()
    shutil.copy(REPOSITORY / "tests/run.sh", tmp_path / "tests")
    executable(tmp_path / "launch/setup.sh", 'echo "setup $*" >>calls')
    for name in CHECKS:
        executable(
            tmp_path / f".venv/bin/{name}", f'echo "{name} $*" >>calls; exit $(cat fail-{name} 2>/dev/null || echo 0)'
        )
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    return tmp_path


def run_checks(checkout: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    result = run("bash", checkout / "tests/run.sh", *arguments)
    return result, (checkout / "calls").read_text().splitlines()


def test_all_checks_run_and_pytest_gets_the_arguments(checkout: Path) -> None:
    result, calls = run_checks(checkout, "-k", "foo")
    assert calls == [
        "setup dev mpi",
        "ruff check .",
        "ruff format --check .",
        "mypy ",
        "shellcheck launch/setup.sh tests/run.sh",
        "hadolint Dockerfile",
        "python -m pytest -k foo",
    ]
    assert result.stdout.count(": ok, ") == 7
    assert result.returncode == 0


@pytest.mark.parametrize("name", CHECKS)
def test_a_failing_check_fails_the_run_and_does_not_stop_the_other_checks(checkout: Path, name: str) -> None:
    (checkout / f"fail-{name}").write_text("1")
    result, calls = run_checks(checkout)
    assert len(calls) == 7
    assert "FAILED" in result.stdout
    assert result.stderr.startswith("failed: ")
    assert result.returncode == 1


def test_a_script_with_a_syntax_error_fails_the_run(checkout: Path) -> None:
    (checkout / "launch/broken.sh").write_text("if true; then\n")
    result, _ = run_checks(checkout)
    assert "failed: bash -n" in result.stderr
    assert result.returncode == 1


def test_no_check_runs_if_setup_fails(checkout: Path) -> None:
    executable(checkout / "launch/setup.sh", "touch calls; exit 1")
    result, calls = run_checks(checkout)
    assert calls == []
    assert result.returncode == 1


# Python scripts


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.name)
def test_a_benchmark_prints_its_usage(script: Path) -> None:
    result = run(sys.executable, script, "--help", DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


# This program runs a script as if the libraries that take seconds to import were not installed.
WITHOUT_LIBRARIES = """
import runpy, sys
sys.modules |= dict.fromkeys(("torch", "transformers", "deepspeed", "megatron.core"))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_libraries(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", WITHOUT_LIBRARIES, script, *arguments, PYTHONPATH=str(REPOSITORY))


@pytest.mark.parametrize("script", PYTHON_SCRIPTS, ids=lambda path: path.name)
def test_a_script_prints_its_usage_without_importing_torch(script: Path) -> None:
    result = run_without_libraries(script, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    "command",
    [
        "pretrain/evaluate.py --checkpoint MISSING --data x",
        "tools/convert_to_hf.py --checkpoint MISSING --output new",
        "tools/convert_from_hf.py --checkpoint MISSING --output new",
        "tools/generate.py --checkpoint MISSING --prompt x",
        "tools/inspect_checkpoint.py --checkpoint MISSING",
        "tools/summarize_run.py --checkpoint MISSING",
    ],
)
def test_a_missing_folder_is_reported_without_importing_torch(command: str, tmp_path: Path) -> None:
    script, *words = command.replace("MISSING", str(tmp_path / "frist")).replace("new", str(tmp_path / "new")).split()
    result = run_without_libraries(REPOSITORY / script, *words)
    expected = f"error: {tmp_path}/frist: is not a folder; check the path; give the run folder or Hugging Face folder\n"
    assert (result.returncode, result.stderr) == (2, expected)


@pytest.mark.parametrize(
    "command",
    [
        "pretrain/evaluate.py --checkpoint x --data x --micro-batch-size=0",
        "pretrain/evaluate.py --checkpoint x --data x --sequence-length=0",
        "pretrain/evaluate.py --checkpoint x --data x --sequence-length=-4",
        f"tools/convert_from_hf.py --checkpoint x --output x --seed={2**70}",
        "tools/convert_from_hf.py --checkpoint x --output x --seed=-1",
        "tools/preflight.py --config x --deepspeed_config x --least=nan",
        "tools/preflight.py --config x --deepspeed_config x --mebibytes=0",
    ],
)
def test_an_invalid_number_is_reported_with_its_option(command: str) -> None:
    script, *words = command.split()
    result = run_without_libraries(REPOSITORY / script, *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {words[-1]}: is ")


RECIPE = yaml.safe_load((REPOSITORY / "pretrain/recipes/quickstart.yaml").read_text())
JSON = REPOSITORY / "ds_configs/zero1.json"


@pytest.mark.parametrize("script", ["pretrain/train.py", "tools/preflight.py"])
def test_an_error_in_a_deepspeed_json_is_reported_without_importing_torch(script: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimizaton": {}}')
    words = ["--config", REPOSITORY / "pretrain/recipes/quickstart.yaml", "--deepspeed_config", tmp_path / "ds.json"]
    result = run_without_libraries(REPOSITORY / script, *words)
    expected = f"error: {tmp_path}/ds.json: zero_optimizaton: unknown key; did you mean 'zero_optimization'?\n"
    assert (result.returncode, result.stderr) == (2, expected)


@pytest.mark.parametrize("script", ["pretrain/train.py", "tools/preflight.py"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modle": {}}, "{recipe}: modle: unknown key; did you mean 'model'?"),
        ({"model": {"hiden_size": 8}}, "{recipe}: model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ({"model": {"hidden_size": "8"}}, "{recipe}: model.hidden_size='8': is not valid; Input should be a valid"),
        ({"model": {"preset": "tiny"}}, "model.preset=tiny: is unknown; did you mean 'tiny-10m'?"),
        ({"data": {}}, "{recipe}: data.train: is missing; add this key"),
        ({"train": {**RECIPE["train"], "steps": 0}}, "{recipe}: train.steps=0: is not valid; Input should be greater"),
        ({"schedule": {"warmup_steps": 10**6}}, "schedule.warmup_steps=1000000: together with decay_steps="),
    ],
)
def test_an_error_in_a_recipe_is_reported_without_importing_torch(
    script: str, changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, **changes}))
    result = run_without_libraries(REPOSITORY / script, "--config", recipe, "--deepspeed_config", JSON)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("error: " + expected.format(recipe=recipe))


def test_gpu_benchmarks_report_a_missing_gpu_in_one_line(bare_path: Path) -> None:
    suite = run("bash", REPOSITORY / "benchmarks/gpu_suite.sh", PATH=str(bare_path))
    overlap = run(sys.executable, REPOSITORY / "benchmarks/overlap.py", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    assert suite.stderr == "gpu_suite: this machine has no NVIDIA GPU; run the suite on a machine with a GPU\n"
    assert suite.returncode == 1
    [line] = overlap.stderr.splitlines()
    assert line.startswith("error: no GPU: ")
    assert overlap.returncode == 2
