"""constraints.txt pins every direct dependency to a version that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = ("dev", "bench", "eval", "mpi", "gpu")  # extras that launch/setup.sh installs
INSTALLED = [
    *PROJECT["dependencies"],
    *(requirement for extra in EXTRAS for requirement in PROJECT["optional-dependencies"][extra]),
]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("text", INSTALLED)
def test_each_direct_dependency_is_pinned_to_an_allowed_version(text: str) -> None:
    requirement = Requirement(text)
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_setup_installs_the_pinned_torch() -> None:
    [version] = re.findall(r'^readonly TORCH="torch==([^"]+)"', (REPOSITORY / "launch/setup.sh").read_text(), re.M)
    assert pins()["torch"] == version
