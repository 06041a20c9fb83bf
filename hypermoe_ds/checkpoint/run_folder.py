"""The run folder: resolved settings, tokenizer, checkpoints and metrics."""

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
from hypermoe_ds.files import scratch_folder, write_durably
from hypermoe_ds.modeling import HyperMoEConfig

# Keys of a model's configuration that do not affect its weights or outputs.
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
        """The checkpoint directory."""
        return self.path / "checkpoints"

    @property
    def watch(self) -> Path:
        """Folder of the ranks' heartbeats, the failure report and the stacks of ranks that waited for a lost rank."""
        return self.path / "watch"

    @property
    def settings(self) -> Path:
        """The file with the recipe, including all defaults and overrides."""
        return self.path / "resolved" / "config.yaml"

    @property
    def ds_config(self) -> Path:
        """The file with the configuration for DeepSpeed."""
        return self.path / "resolved" / "deepspeed.json"

    @property
    def model(self) -> Path:
        """Folder of the model's config.json."""
        return self.path / "resolved" / "model"

    @property
    def model_section(self) -> Path:
        """The file with the recipe's `model` section, written only if a run is initialised from existing weights."""
        return self.path / "resolved" / "model.yaml"

    @property
    def tokenizer(self) -> Path:
        """The run's copy of the tokenizer folder."""
        return self.path / "resolved" / "tokenizer"

    def exists(self) -> bool:
        """Return whether a run has begun in this folder."""
        return (self.model / "config.json").is_file()

    def read_settings(self) -> dict[str, Any]:
        """Read the resolved recipe.

        Raises:
            UserError: the file is missing or damaged.
        """
        return load_yaml(self.settings)

    def section(self, name: str, kind: type[Section]) -> Section:
        """Read one section of the resolved recipe.

        Raises:
            UserError: the recipe is missing or damaged.
        """
        return validate(kind, self.read_settings().get(name, {}), f"{self.settings}: {name}")

    def model_config(self) -> HyperMoEConfig:
        """Read the configuration of the run's model.

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

    def check_same_run(self, model_config: HyperMoEConfig, tokenizer: Path) -> None:
        """Refuse to continue with a different model or tokenizer.

        Raises:
            UserError: the model or the tokenizer differs from that of the run.
        """
        self.check_same_model(model_config)
        self.check_same_tokenizer(tokenizer)

    def check_same_model(self, model_config: HyperMoEConfig) -> None:
        """Refuse to continue with a different model.

        Raises:
            UserError: the folder contains a run whose model configuration differs from `model_config`.
        """
        if not self.exists():
            return
        refuse_other_model(model_fields(model_config), model_fields(self.model_config()), self.path)

    def check_same_tokenizer(self, tokenizer: Path) -> None:
        """Refuse to continue with a tokenizer that differs from the first launch's.

        Raises:
            UserError: the folder has a tokenizer, and one of its vocabulary files differs from that of `tokenizer`.
        """
        if not self.tokenizer.is_dir():
            return
        given, own = vocabulary_digests(tokenizer), vocabulary_digests(self.tokenizer)
        for name in sorted(given | own):
            if given.get(name) != own.get(name):
                raise UserError(
                    f"data.tokenizer={tokenizer}",
                    f"differs from the run's tokenizer, {self.tokenizer} ({name} differs)",
                    "give the tokenizer of that run or choose another run.dir",
                )

    def write_model(self, model_config: HyperMoEConfig) -> None:
        """Write the model's config.json, without modeling code."""
        self.model.mkdir(parents=True, exist_ok=True)
        write_durably(self.model / "config.json", model_config.to_json_string())

    def write_settings(
        self, settings: Mapping[str, Any], ds_config: Mapping[str, Any], model: HyperMoEConfig, tokenizer: Path
    ) -> None:
        """Write all settings of the launch, including derived values, to `resolved/`.

        Only the first launch copies the tokenizer.
        """
        self.settings.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.settings, yaml.safe_dump(dict(settings), sort_keys=False))
        write_durably(self.ds_config, json.dumps(ds_config, indent=2) + "\n")
        self.write_model(model)
        if not self.tokenizer.exists():
            with scratch_folder(self.tokenizer) as scratch:
                copy = scratch / self.tokenizer.name
                copy.mkdir()
                for path in tokenizer_files(tokenizer):
                    shutil.copy(path, copy)
                copy.rename(self.tokenizer)


def model_fields(model_config: HyperMoEConfig) -> dict[str, Any]:
    """Return the fields of a model's configuration that affect weights or outputs, as JSON."""
    fields: dict[str, Any] = json.loads(json.dumps(model_config.to_dict()))
    return {key: value for key, value in fields.items() if key not in _BOOKKEEPING}


def refuse_other_model(ours: Mapping[str, Any], theirs: Mapping[str, Any], run: Path) -> None:
    """Refuse a model that differs from the run's model. Fields that the run did not record are not compared.

    Raises:
        UserError: a field differs; the error names the first such field.
    """
    for key in ours:
        if key in theirs and ours[key] != theirs[key]:
            raise UserError(
                f"model.{key}={ours[key]!r}",
                f"differs from {theirs[key]!r} in the run folder {run}",
                "choose another run.dir or use the model of that run",
            )


def check_step(step: int | None, paths: Iterable[Path]) -> None:
    """Refuse `--step` if none of the folders is a run folder.

    Raises:
        UserError: a step is given, and no folder is a run folder.
    """
    if step is not None and not any(RunFolder(path).exists() for path in paths):
        raise UserError(f"--step={step}", "only run folders have steps, but none is given", "remove it")
