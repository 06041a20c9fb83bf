"""The folder of a run: its settings as run, its tokenizer, its checkpoints and its numbers."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hypermoe_ds.checkpoint.hf_folder import read_hypermoe_config
from hypermoe_ds.config import Section, load_yaml, validate
from hypermoe_ds.data.tokenizer import tokenizer_files, vocabulary_digests
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import scratch_beside, write_durably
from hypermoe_ds.modeling import HyperMoEConfig

# Keys of a model configuration that say nothing about the model's weights or outputs.
_BOOKKEEPING = ("transformers_version", "architectures", "auto_map", "dtype", "_name_or_path")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint, and `latest`."""
        return self.path / "checkpoints"

    @property
    def watch(self) -> Path:
        """The ranks' signs of life, and the stacks of those that waited in vain."""
        return self.path / "watch"

    @property
    def settings(self) -> Path:
        """The recipe with all defaults and overrides."""
        return self.path / "resolved" / "config.yaml"

    @property
    def ds_config(self) -> Path:
        """The DeepSpeed configuration as DeepSpeed got it."""
        return self.path / "resolved" / "deepspeed.json"

    @property
    def model(self) -> Path:
        """Folder of the model's config.json."""
        return self.path / "resolved" / "model"

    @property
    def model_section(self) -> Path:
        """The model as a recipe's `model` section, of a run whose weights came from elsewhere."""
        return self.path / "resolved" / "model.yaml"

    @property
    def tokenizer(self) -> Path:
        """Copy of the tokenizer's folder."""
        return self.path / "resolved" / "tokenizer"

    def exists(self) -> bool:
        """Whether a run has begun in this folder."""
        return (self.model / "config.json").is_file()

    def read_settings(self) -> dict[str, Any]:
        """Read the recipe as run.

        Raises:
            UserError: it is missing or damaged.
        """
        return load_yaml(self.settings)

    def section(self, name: str, kind: type[Section]) -> Section:
        """Read one section of the recipe as run.

        Raises:
            UserError: the recipe is missing or damaged.
        """
        return validate(kind, self.read_settings().get(name, {}), f"{self.settings}: {name}")

    def model_config(self) -> HyperMoEConfig:
        """Configuration of the run's model.

        Raises:
            UserError: this is not a run folder, or its config.json is damaged.
        """
        if not self.exists():
            raise UserError(str(self.path), "is not a run folder (no resolved/model/config.json)", "give a run.dir")
        try:
            return read_hypermoe_config(self.model)
        except UserError as error:
            remedy = "restore it, or remove it: the next launch writes it again"
            raise UserError(str(self.model / "config.json"), f"is damaged ({error})", remedy) from None

    def check_same_run(self, config: HyperMoEConfig, tokenizer: Path) -> None:
        """Refuse to continue with another model or tokenizer than the folder's.

        Raises:
            UserError: as `check_same_model` and `check_same_tokenizer`.
        """
        self.check_same_model(config)
        self.check_same_tokenizer(tokenizer)

    def check_same_model(self, config: HyperMoEConfig) -> None:
        """Refuse to continue with another model than the folder's.

        Raises:
            UserError: the folder holds a run, and a field of its model differs.
        """
        if not self.exists():
            return
        refuse_other_model(model_fields(config), model_fields(self.model_config()), self.path)

    def check_same_tokenizer(self, tokenizer: Path) -> None:
        """Refuse another tokenizer than the one of the run's first launch.

        Raises:
            UserError: the folder holds a tokenizer, and a vocabulary file of `tokenizer` differs from it.
        """
        if not self.tokenizer.is_dir():
            return
        given, own = vocabulary_digests(tokenizer), vocabulary_digests(self.tokenizer)
        for name in sorted(given | own):
            if given.get(name) != own.get(name):
                raise UserError(
                    f"data.tokenizer={tokenizer}",
                    f"is another tokenizer than the run's, {self.tokenizer} ({name} differs)",
                    "give the tokenizer of that run or choose another run.dir",
                )

    def write_model(self, config: HyperMoEConfig) -> None:
        """Write the model's config.json; no code goes with it."""
        self.model.mkdir(parents=True, exist_ok=True)
        write_durably(self.model / "config.json", config.to_json_string())

    def write_settings(
        self, settings: Mapping[str, Any], ds_config: Mapping[str, Any], model: HyperMoEConfig, tokenizer: Path
    ) -> None:
        """Write `resolved/`: what the run is launched with, derived values included.

        The tokenizer is copied at the first launch only.
        """
        self.settings.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.settings, yaml.safe_dump(dict(settings), sort_keys=False))
        write_durably(self.ds_config, json.dumps(ds_config, indent=2) + "\n")
        self.write_model(model)
        if not self.tokenizer.exists():
            with scratch_beside(self.tokenizer) as scratch:
                copy = scratch / self.tokenizer.name
                copy.mkdir()
                for path in tokenizer_files(tokenizer):
                    shutil.copy(path, copy)
                copy.rename(self.tokenizer)


def model_fields(config: HyperMoEConfig) -> dict[str, Any]:
    """Fields of a configuration that change a model's weights or outputs, as JSON holds them."""
    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return {key: value for key, value in fields.items() if key not in _BOOKKEEPING}


def refuse_other_model(ours: Mapping[str, Any], theirs: Mapping[str, Any], run: Path) -> None:
    """Compare the fields of two models. A field that the run's lacks, because it is newer, is not compared.

    Raises:
        UserError: the first one of ours that differs from the run's.
    """
    for key in ours:
        if key in theirs and ours[key] != theirs[key]:
            raise UserError(
                f"model.{key}={ours[key]!r}",
                f"{run} is the run of another model (there it is {theirs[key]!r})",
                "choose another run.dir or the model of that run",
            )


def check_step(step: int | None, paths: Iterable[Path]) -> None:
    """Refuse a step that no folder could have.

    Raises:
        UserError: there is a step, and none of the folders is a run's.
    """
    if step is not None and not any(RunFolder(path).exists() for path in paths):
        raise UserError(f"--step={step}", "only a run folder has steps and none is given", "leave it out")
