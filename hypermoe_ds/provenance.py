"""Find the versions of this code and of the packages that it uses."""

import hashlib
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_REPOSITORY = Path(__file__).parents[1]
_SOURCES = ("hypermoe_ds", "pretrain")
_PACKAGES = ("hypermoe-ds", "torch", "deepspeed", "transformers")


def versions_now() -> dict[str, str]:
    """Return the git commit of the code and the versions of the packages that affect results."""
    return {"git_commit": git_commit(), **{package: package_version(package) for package in _PACKAGES}}


def package_version(package: str) -> str:
    """Return the installed version of a package, or "unknown"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@cache
def git_commit() -> str:
    """Return the git commit of the checkout that contains this file, or "unknown" outside a checkout."""
    # In containers, the checkout often belongs to another user. Without safe.directory, git then refuses to read it.
    command = ["git", "-C", str(_REPOSITORY), "-c", "safe.directory=*", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def source_digest(repository: Path = _REPOSITORY) -> str:
    """Return a short digest of the Python sources used in training, including uncommitted edits."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (repository / folder).rglob("*.py")):
        digest.update(path.relative_to(repository).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]
