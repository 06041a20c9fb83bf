"""Modules import only from lower layers, and files and functions stay small."""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "hypermoe_ds"
SCRIPTS = ("pretrain", "tools", "launch", "benchmarks")
MEASUREMENTS = ("benchmarks/",)  # these scripts may define dataclasses for measurements
ORDER = (  # from the lowest layer to the highest
    {PACKAGE},  # __init__.py of the package
    {"errors", "provenance"},
    {"files", "process", "config", "progress", "device"},
    {"modeling", "data", "parallel"},
    {"checkpoint", "monitor", "resilience"},
    {"training", "export", "inspection", "cluster"},
    {"run_config"},
    {"job", "report", "run_samples"},
    set(SCRIPTS),
)
LEVELS = {unit: level for level, units in enumerate(ORDER) for unit in units}
DEEPSPEED_IMPORTERS = {  # the only modules that may import DeepSpeed; at most six
    "hypermoe_ds/parallel/parallelize.py",
    "hypermoe_ds/training/engine.py",
    "hypermoe_ds/checkpoint/engine_state.py",
}
DEEPSPEED_BENCHMARKS = "benchmarks/"  # these scripts compare HyperMoE with DeepSpeed's own layers
WITHOUT_DEEPSPEED = ("hypermoe_ds/parallel/topology.py", "hypermoe_ds/training/ds_config.py")
WITHOUT_TORCH = ("hypermoe_ds/report/",)
MODELING_MAY_USE = {"torch", "transformers", *sys.stdlib_module_names}
MODULE_NAME = rf"({'|'.join((PACKAGE, *SCRIPTS))})(\.[a-z_]\w*)+"
FILE_LINES, FUNCTION_LINES = 500, 60


def python_files(root: Path, folders: tuple[str, ...] = (PACKAGE, *SCRIPTS)) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_names(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and absolute name of each import, even inside functions; `from a import b` yields `a.b`."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Attribute) and (dotted := ast.unparse(node)).startswith(f"{PACKAGE}."):
            yield node.lineno, dotted


def named_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and value of each string that names a module, for import_module, runpy or `python -m`."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(MODULE_NAME, node.value):
            yield node.lineno, node.value


def computed_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and code of each dynamic import whose module name is not an absolute constant."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__", "run_module")
        ):
            names = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg in ("name", "mod_name"))]
            name = names[0] if names else None
            if not (isinstance(name, ast.Constant) and not str(name.value).startswith(".")):
                yield node.lineno, ast.unparse(node)


def unit_of_file(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] in SCRIPTS:
        return parts[0]
    return PACKAGE if parts[1] == "__init__" else parts[1]


def unit_of_name(dotted: str) -> str | None:
    """Return the subpackage, module or scripts folder of an imported name; None for other libraries."""
    first, *rest = dotted.split(".")
    if first in SCRIPTS:
        return first
    if first != PACKAGE:
        return None
    is_module = bool(rest) and (len(rest) > 1 or rest[0] in LEVELS)
    return rest[0] if is_module else PACKAGE


def import_violations(root: Path) -> list[str]:
    found = []
    for path in python_files(root):
        unit, name = unit_of_file(path, root), path.relative_to(root).as_posix()
        if unit not in LEVELS:
            found.append(f"{name}: '{unit}' is missing from ORDER")
            continue
        found += [f"{name}:{line} {code}: give a constant module name" for line, code in computed_imports(path)]
        for line, dotted in (*imported_names(path, root), *named_modules(path)):
            target, top = unit_of_name(dotted), dotted.partition(".")[0]
            where = f"{name}:{line} imports {dotted}"
            if target is not None and target not in LEVELS:
                found.append(f"{where}: '{target}' is missing from ORDER")
            elif target is not None and target != unit and LEVELS[target] >= LEVELS[unit]:
                found.append(f"{where}: '{target}' is not below '{unit}'")
            elif unit == "modeling" and (target or top) not in {"modeling", *MODELING_MAY_USE}:
                found.append(f"{where}: modeling may import only torch, transformers and the standard library")
            elif top == "deepspeed" and name not in DEEPSPEED_IMPORTERS and not name.startswith(DEEPSPEED_BENCHMARKS):
                found.append(f"{where}: only DEEPSPEED_IMPORTERS may import DeepSpeed")
    return found


def reaches(library: str, start: Path, root: Path) -> bool:
    """Return whether `start` imports the library, directly or through other modules of the repository."""
    waiting, seen = [start], set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        for _, dotted in imported_names(path, root):
            parts = dotted.split(".")
            if parts[0] == library:
                return True
            prefixes = [root.joinpath(*parts[:length]) for length in range(1, len(parts) + 1)]
            waiting += [p / "__init__.py" for p in prefixes] + [p.with_suffix(".py") for p in prefixes]
    return False


def import_cycle(root: Path) -> list[str]:
    """Return modules that import each other in a cycle, even if only inside functions or for type checking."""
    modules = {module_name(path, root): path for path in python_files(root, (PACKAGE,))}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = {
            dotted if dotted in modules else dotted.rpartition(".")[0] for _, dotted in imported_names(path, root)
        }
        graph[name] = imported & modules.keys() - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def size_violations(root: Path, folders: tuple[str, ...]) -> list[str]:
    found = []
    for path in python_files(root, folders):
        name, lines = path.relative_to(root).as_posix(), len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            found.append(f"{name}: {lines} lines; {FILE_LINES} at most")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{name}:{node.lineno} {node.name}: {lines} lines; {FUNCTION_LINES} at most")
    return found


def logic_violations(root: Path) -> list[str]:
    """Report classes in scripts, and `global` statements."""
    found = []
    for path in python_files(root):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and name.startswith(SCRIPTS) and not name.startswith(MEASUREMENTS):
                found.append(f"{name}:{node.lineno} class {node.name}: scripts may not define classes")
            elif isinstance(node, ast.Global):
                found.append(
                    f"{name}:{node.lineno} global {', '.join(node.names)}: functions may not change module state"
                )
    return found


def test_modules_import_only_from_lower_layers() -> None:
    assert import_violations(REPOSITORY) == []


def test_no_modules_import_each_other_in_a_cycle() -> None:
    assert import_cycle(REPOSITORY) == []


def test_order_lists_every_subpackage_and_module() -> None:
    inside = {path.stem for path in (REPOSITORY / PACKAGE).iterdir() if not path.stem.startswith("__")}
    assert set(LEVELS) == {PACKAGE, *SCRIPTS, *inside}
    assert all((REPOSITORY / folder).is_dir() for folder in SCRIPTS)


def test_files_and_functions_stay_small() -> None:
    assert size_violations(REPOSITORY, (PACKAGE, *SCRIPTS, "tests")) == []


def test_scripts_define_no_classes_and_functions_change_no_module_state() -> None:
    assert logic_violations(REPOSITORY) == []


@pytest.mark.parametrize(("library", "without"), [("deepspeed", WITHOUT_DEEPSPEED), ("torch", WITHOUT_TORCH)])
def test_modules_that_must_load_quickly_reach_no_heavy_library(library: str, without: tuple[str, ...]) -> None:
    paths = [p for p in python_files(REPOSITORY) if p.relative_to(REPOSITORY).as_posix().startswith(without)]
    assert paths
    assert [str(path) for path in paths if reaches(library, path, REPOSITORY)] == []


def test_at_most_six_modules_import_deepspeed() -> None:
    assert len(DEEPSPEED_IMPORTERS) <= 6


# Tests of the checks


def write_source(root: Path, name: str, source: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("hypermoe_ds/data/a.py", "from hypermoe_ds.training.loop import run", "not below"),
        ("hypermoe_ds/data/a.py", "from hypermoe_ds import training", "not below"),
        ("hypermoe_ds/data/a.py", "from ..training import loop", "not below"),
        ("hypermoe_ds/data/a.py", "from .. import training", "not below"),
        ("hypermoe_ds/data/a.py", "import hypermoe_ds.run_config as r", "not below"),
        ("hypermoe_ds/data/a.py", "def f():\n    from hypermoe_ds.parallel import topology", "not below"),
        ("hypermoe_ds/data/a.py", "import importlib\nimportlib.import_module('hypermoe_ds.training')", "not below"),
        ("hypermoe_ds/data/a.py", "from hypermoe_ds.training import *", "not below"),
        ("hypermoe_ds/data/a.py", "import importlib as i\ni.import_module(name='hypermoe_ds.training')", "not below"),
        ("hypermoe_ds/data/a.py", "from importlib import import_module as m\nm('hypermoe_ds.training')", "not below"),
        ("hypermoe_ds/data/a.py", "import runpy\nrunpy.run_module('hypermoe_ds.training.loop')", "not below"),
        ("hypermoe_ds/data/a.py", "command = ['python', '-m', 'hypermoe_ds.cluster.interconnect']", "not below"),
        ("hypermoe_ds/data/a.py", "import hypermoe_ds\nx = hypermoe_ds.training", "not below"),
        (
            "hypermoe_ds/data/a.py",
            "from importlib import import_module as import_module\nimport_module(f'a.{b}')",
            "constant",
        ),
        ("hypermoe_ds/data/a.py", "import importlib\nimportlib.import_module('.training', 'hypermoe_ds')", "constant"),
        ("hypermoe_ds/data/a.py", "import tools.plan", "not below"),
        ("hypermoe_ds/errors.py", "from hypermoe_ds.config import Settings", "not below"),
        ("hypermoe_ds/checkpoint/manager.py", "from hypermoe_ds.export.hf import export", "not below"),
        ("pretrain/train.py", "from tools.plan import main", "not below"),
        ("hypermoe_ds/data/a.py", "import hypermoe_ds.attic.old", "missing from ORDER"),
        ("hypermoe_ds/attic/old.py", "", "missing from ORDER"),
        ("hypermoe_ds/modeling/moe.py", "from hypermoe_ds.errors import UserError", "modeling may import"),
        ("hypermoe_ds/modeling/moe.py", "from hypermoe_ds import __version__", "modeling may import"),
        ("hypermoe_ds/modeling/moe.py", "def f():\n    import numpy as np", "modeling may import"),
        ("hypermoe_ds/modeling/moe.py", "import deepspeed", "modeling may import"),
        ("hypermoe_ds/parallel/topology.py", "from deepspeed.utils import groups", "may import DeepSpeed"),
        ("tools/plan.py", "def main():\n    import deepspeed", "may import DeepSpeed"),
        ("launch/start.py", "import deepspeed", "may import DeepSpeed"),
        ("launch/start.py", "from tools.plan import main", "not below"),
        ("hypermoe_ds/cluster/a.py", "from launch import supervise", "not below"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, name: str, source: str, problem: str) -> None:
    write_source(tmp_path, name, source)
    [violation] = import_violations(tmp_path)
    assert problem in violation
    assert violation.startswith(name)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "hypermoe_ds/data/a.py",
            "from hypermoe_ds.errors import UserError\nfrom hypermoe_ds import config, __version__",
        ),
        ("hypermoe_ds/data/a.py", "import numpy as np\nfrom . import b\nfrom hypermoe_ds.data.c import d"),
        ("hypermoe_ds/modeling/moe.py", "import math\nimport torch.nn\nfrom transformers import x\nfrom .h import H"),
        ("hypermoe_ds/training/engine.py", "import deepspeed\nfrom hypermoe_ds.monitor import logger"),
        ("hypermoe_ds/run_config.py", "from hypermoe_ds.training import loop"),
        ("benchmarks/peer.py", "from deepspeed.moe.layer import MoE"),
        ("benchmarks/moe.py", "from hypermoe_ds.run_config import RunConfig\nfrom benchmarks import timing"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, name: str, source: str) -> None:
    write_source(tmp_path, name, source)
    assert import_violations(tmp_path) == []


def test_an_indirect_import_of_deepspeed_is_found(tmp_path: Path) -> None:
    start = write_source(tmp_path, "hypermoe_ds/training/plan.py", "from hypermoe_ds.parallel import topology")
    topology = write_source(tmp_path, "hypermoe_ds/parallel/topology.py", "import math")
    assert not reaches("deepspeed", start, tmp_path)
    topology.write_text("from . import expert_parallel", encoding="utf-8")
    write_source(tmp_path, "hypermoe_ds/parallel/expert_parallel.py", "def f():\n    import deepspeed.comm")
    assert reaches("deepspeed", start, tmp_path)
    topology.write_text("import math", encoding="utf-8")
    write_source(tmp_path, "hypermoe_ds/parallel/__init__.py", "from .expert_parallel import f")
    assert reaches("deepspeed", start, tmp_path)


def test_an_import_cycle_is_found_even_if_one_import_is_inside_a_function(tmp_path: Path) -> None:
    write_source(tmp_path, "hypermoe_ds/data/a.py", "from hypermoe_ds.data.b import f")
    other = write_source(tmp_path, "hypermoe_ds/data/b.py", "import math")
    assert import_cycle(tmp_path) == []
    other.write_text("def f():\n    from . import a", encoding="utf-8")
    assert set(import_cycle(tmp_path)) == {"hypermoe_ds.data.a", "hypermoe_ds.data.b"}


def test_an_oversized_file_or_function_is_found(tmp_path: Path) -> None:
    def function_of(lines: int) -> str:
        return "def f():\n" + "    x = 1\n" * (lines - 1)

    path = write_source(
        tmp_path, "hypermoe_ds/data/a.py", function_of(FUNCTION_LINES) + "\n" * (FILE_LINES - FUNCTION_LINES)
    )
    assert size_violations(tmp_path, (PACKAGE,)) == []
    path.write_text(function_of(FUNCTION_LINES + 1), encoding="utf-8")
    assert ["f: 61 lines" in v for v in size_violations(tmp_path, (PACKAGE,))] == [True]
    path.write_text("\n" * (FILE_LINES + 1), encoding="utf-8")
    assert ["a.py: 501 lines" in v for v in size_violations(tmp_path, (PACKAGE,))] == [True]


def test_a_class_in_a_script_and_a_global_statement_are_found(tmp_path: Path) -> None:
    write_source(tmp_path, "hypermoe_ds/data/a.py", "class Reader:\n    pass")
    assert logic_violations(tmp_path) == []
    write_source(tmp_path, "benchmarks/time.py", "class Seconds:\n    pass")
    assert logic_violations(tmp_path) == []
    write_source(tmp_path, "tools/plan.py", "class Planner:\n    pass")
    write_source(tmp_path, "hypermoe_ds/data/b.py", "n = 0\ndef f():\n    global n\n    n = 1")
    assert ["class Planner" in v or "global n" in v for v in logic_violations(tmp_path)] == [True, True]
