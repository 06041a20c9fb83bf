"""The training command that is supervised, and what it says of the run."""

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
    """A command line that ends up in train.py.

    Attributes:
        words: as given.
        recipe: its `--config`.
        deepspeed_config: its `--deepspeed_config`; None leaves it to the launch script.
        overrides: its `section.key=value`.
        run_dir: the run folder.
    """

    words: Sequence[str]
    recipe: str
    deepspeed_config: str | None
    overrides: Sequence[str]
    run_dir: Path

    @classmethod
    def read(cls, words: Sequence[str]) -> "TrainingCommand":
        """Understand a command line.

        Raises:
            UserError: it has no `--config`, or a recipe that cannot be read or names no run folder.
        """
        recipe = _option(words, "--config")
        if recipe is None:
            remedy = "give `deepspeed ... train.py --config ...` or a script of launch/"
            raise UserError(shlex.join(words), "is no training command", remedy)
        overrides = [word for word in words if _OVERRIDE.match(word)]
        section = apply_overrides(load_yaml(recipe), overrides).get("run")
        folder = section.get("dir") if isinstance(section, dict) else None
        if not isinstance(folder, str):
            raise UserError(f"{recipe}: run.dir", "is missing", "give the run folder")
        return cls(words, recipe, _option(words, "--deepspeed_config"), overrides, Path(folder))

    def started_with(self, hostfile: Path | None, overrides: Sequence[str]) -> list[str]:
        """The words of one start: on these hosts, with these overrides, from the newest checkpoint."""
        words = [word.replace(HOSTS, str(hostfile)) for word in self.words]
        return [*words, *overrides, "checkpoint.resume=auto"]


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of an option, in one word or two."""
    for place, word in enumerate(words):
        if word == name and place + 1 < len(words):
            return words[place + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
