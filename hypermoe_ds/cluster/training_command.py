"""Parse the training command that the supervisor runs."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypermoe_ds.config import apply_overrides, load_yaml
from hypermoe_ds.errors import UserError

HOSTS = "{hosts}"
_OVERRIDE = re.compile(r"\w+(\.\w+)+=")


@dataclass(frozen=True)
class TrainingCommand:
    """A command line that runs train.py.

    Attributes:
        words: the command line.
        recipe: value of `--config`.
        deepspeed_config: value of `--deepspeed_config`; None selects the launch script's default.
        overrides: `section.key=value` arguments.
        run_dir: the run folder.
    """

    words: Sequence[str]
    recipe: str
    deepspeed_config: str | None
    overrides: Sequence[str]
    run_dir: Path

    @classmethod
    def read(cls, words: Sequence[str]) -> "TrainingCommand":
        """Parse a command line.

        Raises:
            UserError: the command has no `--config`, or its recipe cannot be read or has no `run.dir`.
        """
        recipe = _option(words, "--config")
        if recipe is None:
            remedy = "give `deepspeed ... train.py --config ...` or a script in launch/"
            raise UserError(shlex.join(words), "is not a training command", remedy)
        overrides = [word for word in words if _OVERRIDE.match(word)]
        section = apply_overrides(load_yaml(recipe), overrides).get("run")
        folder = section.get("dir") if isinstance(section, dict) else None
        if not isinstance(folder, str):
            raise UserError(f"{recipe}: run.dir", "is missing", "give the run folder")
        return cls(words, recipe, _option(words, "--deepspeed_config"), overrides, Path(folder))

    def started_with(self, hostfile: Path | None, overrides: Sequence[str]) -> list[str]:
        """Return the command line that uses these hosts and overrides and resumes from the newest checkpoint."""
        words = [word.replace(HOSTS, str(hostfile)) for word in self.words]
        return [*words, *overrides, "checkpoint.resume=auto"]


def _option(words: Sequence[str], name: str) -> str | None:
    """Return the value of an option, given as `NAME VALUE` or `NAME=VALUE`."""
    for index, word in enumerate(words):
        if word == name and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
