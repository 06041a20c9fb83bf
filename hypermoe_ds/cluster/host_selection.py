"""Select the hosts for an attempt: the hosts in a hostfile that pass the preflight."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from hypermoe_ds.cluster.hosts import read_hostfile
from hypermoe_ds.cluster.training_command import HOSTS, TrainingCommand
from hypermoe_ds.errors import UserError


class SelectedHosts(NamedTuple):
    """The hostfile of one attempt and the overrides needed to train on its hosts."""

    hostfile: Path
    overrides: Sequence[str]


class HostSelector:
    """Select hosts for a training command.

    Args:
        hostfile: file that lists all hosts that may be used.
        command: the training command.
        preflight: command that runs the preflight.
        deepspeed_config: DeepSpeed JSON to use if the command does not specify one.

    Raises:
        UserError: the hostfile cannot be read, or the command does not contain `{hosts}`.
    """

    def __init__(
        self, hostfile: Path, command: TrainingCommand, preflight: Sequence[str], deepspeed_config: str
    ) -> None:
        if not any(HOSTS in word for word in command.words):
            remedy = f"write --hostfile {HOSTS} into the command after --"
            raise UserError(f"--hostfile {hostfile}", "the command does not use it", remedy)
        self.hosts = read_hostfile(hostfile)
        self._chosen = command.run_dir / "hostfile"
        named = ["--config", command.recipe, "--deepspeed_config", command.deepspeed_config or deepspeed_config]
        self._preflight = [*preflight, "--hostfile", str(hostfile), *named, *command.overrides]

    def choose(self) -> SelectedHosts | None:
        """Return the hosts that can train now; None if there are none. The preflight prints each failed check."""
        with TemporaryDirectory() as folder:
            found = Path(folder) / "fit.json"
            if subprocess.run([*self._preflight, "--fit", str(found)], check=False).returncode:
                return None
            fit = json.loads(found.read_text(encoding="utf-8"))
        try:
            self._chosen.parent.mkdir(parents=True, exist_ok=True)
            self._chosen.write_text("\n".join(fit["hosts"]) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"error: {self._chosen}: cannot be written ({error.strerror})", file=sys.stderr)
            return None
        return SelectedHosts(self._chosen, fit["overrides"])
