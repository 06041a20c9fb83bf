"""Define all settings of a run: the sections of a recipe, checks across sections, and the settings table."""

import ast
import json
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import Field, create_model, model_validator

from hypermoe_ds.checkpoint.settings import CheckpointConfig
from hypermoe_ds.config import LARGEST_COUNT, PathText, Settings, apply_overrides, closest, load_yaml, validate
from hypermoe_ds.data.settings import DataConfig, Stage
from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.data.tokenizer import embeddings_needed, load_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.monitor.settings import MonitorConfig
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.training.settings import (
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    integral_to_int,
)
from hypermoe_ds.training.state import TrainState

if TYPE_CHECKING:
    from hypermoe_ds.modeling import HyperMoEConfig

_VOCABULARY_MULTIPLE = 128  # GPUs multiply by the embedding matrix fastest if the vocabulary size is a multiple of 128

# From twice this number on, float64 no longer represents the times by which `Blend` orders samples.
_MOST_SAMPLES = 10**15

_MODEL_SOURCE = Path(__file__).parent / "modeling/configuration_hypermoe.py"
# Fields of `HyperMoEConfig` that a recipe cannot set: the tokenizer, generation or an export sets them.
_NOT_SETTINGS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "baked_hyper_experts")


@cache
def _vocabulary_for(tokenizer: str) -> int:
    """Return the vocabulary size for a tokenizer folder; cached, because a launch needs it several times."""
    needed = embeddings_needed(load_tokenizer(tokenizer))
    return -(-needed // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


class RunSection(Settings):
    """Settings of the section `run`."""

    dir: PathText = Field(description="the run folder: settings, metrics, TensorBoard files and checkpoints")


class _Declared(NamedTuple):
    """A field of `HyperMoEConfig`."""

    kind: Any
    default: Any
    description: str


def _read_model_source() -> tuple[dict[str, _Declared], dict[str, dict[str, Any]]]:
    """Parse the fields of `HyperMoEConfig` and the presets from its source code.

    Importing `HyperMoEConfig` would load Transformers and torch, which takes 3 s. Most errors in a recipe can be found
    without these libraries.
    """
    tree = ast.parse(_MODEL_SOURCE.read_text(encoding="utf-8"))
    literal: Any = Literal
    kinds: dict[str, Any] = {"int": int, "float": float, "bool": bool}
    fields: dict[str, _Declared] = {}
    presets: dict[str, dict[str, Any]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
            choices = node.value.slice  # type: ignore[attr-defined]
            kinds[ast.unparse(node.targets[0])] = literal[ast.literal_eval(choices)]
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PRESETS":
            presets = ast.literal_eval(node.value.args[0])  # type: ignore[union-attr]
        elif isinstance(node, ast.ClassDef) and node.name == "HyperMoEConfig":
            for item, below in pairwise(node.body):
                if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) not in _NOT_SETTINGS:
                    assert isinstance(below, ast.Expr), f"{ast.unparse(item.target)} has no description"
                    kind, default = kinds[ast.unparse(item.annotation)], ast.literal_eval(item.value)  # type: ignore[arg-type]
                    description = " ".join(ast.literal_eval(below.value).split())
                    fields[ast.unparse(item.target)] = _Declared(kind, default, description.rstrip("."))
    return fields, presets


_MODEL_FIELDS, _PRESETS = _read_model_source()


def _model_fields() -> dict[str, Any]:
    """Return the fields of the model section; each field is optional, because a preset may provide its value."""
    fields: dict[str, Any] = {
        "preset": (str | None, Field(None, description=f"preset to start from: {', '.join(_PRESETS)}"))
    }
    for name, field in _MODEL_FIELDS.items():
        description = field.description
        if name == "vocab_size":
            description += (
                "; null uses that of the preset or, without a preset, the largest token id of data.tokenizer + 1, "
                f"rounded up to a multiple of {_VOCABULARY_MULTIPLE}"
            )
        fields[name] = (field.kind | None, Field(None, description=description))
    return fields


ModelSection = create_model("ModelSection", __base__=Settings, **_model_fields())


def model_section(model_config: "HyperMoEConfig") -> dict[str, Any]:
    """Return the `model` section of a recipe for this model, with every field."""
    return {key: getattr(model_config, key) for key in ModelSection.model_fields if key != "preset"}


class RunConfig(Settings):
    """All settings of a run, as given by a recipe."""

    run: RunSection
    model: ModelSection
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_length(cls, recipe: Any) -> Any:
        """Compute `train.tokens` from `train.steps` or vice versa; a recipe gives one of these settings."""
        train, data = (recipe.get(name) if isinstance(recipe, dict) else None for name in ("train", "data"))
        if not isinstance(train, dict) or not isinstance(data, dict):
            return recipe
        steps, tokens = train.get("steps"), integral_to_int(train.get("tokens"))
        if steps is None and tokens is None and set(train) <= set(TrainConfig.model_fields):
            raise UserError("train.steps", "is missing, and so is train.tokens", "give one of them")
        batch: Any = train.get("global_batch_size")
        length: Any = data.get("sequence_length")
        given = [batch, length, *([value for value in (steps, tokens) if value is not None] or [None])]
        if not all(type(value) is int and 0 < value <= LARGEST_COUNT**3 for value in given):
            return {**recipe, "train": {"steps": 1, **train}}  # validation reports the missing or invalid value
        if tokens is None:
            return {**recipe, "train": {**train, "tokens": steps * batch * length}}
        needed = -(-tokens // (batch * length))
        if steps not in (None, needed):
            where, problem = f"train.tokens={tokens}", f"takes {needed:,} steps, but train.steps is {steps}"
            raise UserError(where, problem, "give only one of them, and omit the other or set it to null")
        return {**recipe, "train": {**train, "steps": needed}}

    @property
    def last_step(self) -> int:
        """Step after which this launch ends."""
        return min(self.train.steps, self.train.stop_at_step or self.train.steps)

    @property
    def skipped_samples(self) -> SkippedSamples:
        """Samples that the run skips."""
        return SkippedSamples(self.train.skip_samples)

    def samples(self, state: TrainState) -> int:
        """Return the number of samples that the run needs: those already consumed and those of the remaining steps.

        Earlier steps may have used a different batch size. Skipped samples are included.

        Raises:
            UserError: a range of `train.skip_samples` begins after the last sample, or the run needs too many samples.
        """
        to_come = max(self.train.steps - state.step, 0) * self.train.global_batch_size
        end = self.skipped_samples.after(state.consumed_samples, to_come) if to_come else state.consumed_samples
        for first, last in self.train.skip_samples:
            if first >= end:
                problem = f"begins after the run's last sample, {end - 1}"
                raise UserError(f"train.skip_samples=[[{first}, {last}]]", problem, "remove or correct it")
        if end > _MOST_SAMPLES:
            problem = f"needs {end:,} samples, given train.global_batch_size and train.skip_samples"
            raise UserError(f"train.steps={self.train.steps}", problem, f"stay below {_MOST_SAMPLES:,}")
        return end

    def stages(self, state: TrainState) -> list[tuple[int, Stage]]:
        """Return the current and the later stages of the data, each with the index of its first sample.

        For the current stage, the index is that of the next sample.
        """
        stages = self.data.all_stages()
        current = max(number for number, stage in enumerate(stages) if stage.from_step <= state.step + 1)
        plan = [(state.consumed_samples, stages[current])]
        for stage in stages[current + 1 :]:
            to_come = (stage.from_step - 1 - state.step) * self.train.global_batch_size
            plan.append((self.skipped_samples.after(state.consumed_samples, to_come), stage))
        return plan

    def build_model_config(self) -> "HyperMoEConfig":
        """Build the model configuration from the preset, if any, and the fields of the recipe.

        If neither the preset nor the recipe gives the vocabulary size, the tokenizer determines it.

        Raises:
            UserError: the preset is unknown, fields are inconsistent, or the needed tokenizer cannot be loaded.
        """
        self._check_preset()
        given = {key: value for key, value in self.model.model_dump().items() if value is not None}
        preset = given.pop("preset", None)
        from hypermoe_ds.modeling import ConfigurationError, HyperMoEConfig  # noqa: PLC0415 (the import takes seconds)

        fields = {**_PRESETS.get(preset, {}), **given}
        if "vocab_size" not in fields:
            fields["vocab_size"] = _vocabulary_for(self.data.tokenizer)
        try:
            return HyperMoEConfig(**fields)
        except ConfigurationError as error:
            raise UserError(f"model.{error.where}", error.problem, error.remedy) from None

    def _check_preset(self) -> None:
        preset = self.model.preset  # type: ignore[attr-defined]
        if preset is not None and preset not in _PRESETS:
            raise UserError(f"model.preset={preset}", "is unknown", closest(preset, _PRESETS))

    def resolved(self) -> "RunConfig":
        """Return the recipe with all model fields filled in from the preset and the model's defaults.

        The vocabulary size stays null if neither the recipe nor a preset gives it. This method does not import torch.
        """
        given = {key: value for key, value in self.model.model_dump().items() if value is not None}
        defaults = {name: field.default for name, field in _MODEL_FIELDS.items()}
        fields = {**defaults, "vocab_size": None, **_PRESETS.get(given.pop("preset", None), {}), **given}
        return self.model_copy(update={"model": ModelSection(**fields)})

    def to_yaml(self) -> str:
        """Return the recipe as YAML; loading the YAML gives the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def check(self) -> None:
        """Check that the sections are consistent; `build_model_config` checks the fields of the model.

        Raises:
            UserError: settings are inconsistent. The error names the first inconsistent setting.
        """
        self._check_preset()
        for first, last in self.train.skip_samples:
            if first > last:
                raise UserError(f"train.skip_samples=[[{first}, {last}]]", "ends before it begins", "give first, last")
        self.monitor.check()
        if self.optimizer.lr * self.optimizer.weight_decay >= 1:
            where = f"optimizer.weight_decay={self.optimizer.weight_decay}"
            # AdamW multiplies the weights by 1 - lr * weight_decay in each step.
            raise UserError(where, f"its product with optimizer.lr={self.optimizer.lr} is 1 or more", "lower it")
        ramps = self.schedule.warmup_steps + self.schedule.decay_steps
        if ramps > self.train.steps:
            raise UserError(
                f"schedule.warmup_steps={self.schedule.warmup_steps}",
                f"together with decay_steps={self.schedule.decay_steps} exceeds train.steps={self.train.steps}",
                "shorten the warm-up or the decay",
            )
        if self.schedule.name == "warmup_stable_decay" and self.schedule.decay_steps == 0:
            remedy = "set it to the number of steps in which the learning rate decays"
            raise UserError("schedule.decay_steps=0", "warmup_stable_decay would never decay", remedy)
        self.data.check_stages(self.train.micro_batch_size)
        longest = self.resolved().model.max_position_embeddings  # type: ignore[attr-defined]
        needed = max(stage.sequence_length for stage in self.data.all_stages())
        if 1 <= longest < needed:
            raise UserError(
                f"data.sequence_length={needed}",
                f"is longer than model.max_position_embeddings={longest}",
                "lower data.sequence_length or raise model.max_position_embeddings",
            )


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply `section.key=value` overrides and check the result without torch.

    Raises:
        UserError: the recipe cannot be read or is invalid. The error names the first problem.
    """
    config = validate(RunConfig, apply_overrides(load_yaml(path), overrides), str(path), overrides)
    config.check()
    return config


class _Setting(NamedTuple):
    """A setting as shown in the documentation."""

    name: str
    kind: str
    default: str | None
    description: str


def settings_table() -> str:
    """Return every setting of a recipe with its default and meaning, as a Markdown table."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for setting in _all_settings():
        shown = "required" if setting.default is None else f"`{setting.default}`"
        rows.append(f"| `{setting.name}` | {shown} | {setting.description} |")
    return "\n".join(rows) + "\n"


def settings_help(width: int) -> str:
    """Return every setting of a recipe with its type, default and meaning, as text of at most `width` columns."""
    lines = ["settings of a recipe (section.key=value):"]
    section = ""
    for setting in _all_settings():
        if setting.name.partition(".")[0] != section:
            section = setting.name.partition(".")[0]
            lines += ["", f"{section}:"]
        default = "required" if setting.default is None else f"default: {setting.default}"
        lines.append(f"  {setting.name}  ({setting.kind}; {default})")
        indent = " " * 6
        lines += textwrap.wrap(
            setting.description, max(width, 40), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return "\n".join(lines)


def _all_settings() -> Iterator[_Setting]:
    for section, field in RunConfig.model_fields.items():
        yield from _settings_of(section, field.annotation)  # type: ignore[arg-type]


def _settings_of(section: str, model: type[Settings]) -> Iterator[_Setting]:
    for name, field in model.model_fields.items():
        default = field.default
        if model is ModelSection and name in _MODEL_FIELDS and name != "vocab_size":
            default = _MODEL_FIELDS[name].default
        shown = None if field.is_required() else json.dumps(default)
        yield _Setting(f"{section}.{name}", _kind(field.annotation), shown, field.description or "")
        for item in get_args(field.annotation):
            if isinstance(item, type) and issubclass(item, Settings) and field.is_required():
                yield from _settings_of(f"{section}.{name}[]", item)


def _kind(annotation: Any) -> str:
    """Format a type for the documentation, such as `int`, `bf16|fp16|fp32` or `list of int`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else _kind(part) for part in parts)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is list:
        return f"list of {_kind(parts[0])}"
    if origin is not None:  # Annotated
        return _kind(parts[0])
    return (
        "mapping" if issubclass(annotation, Settings) else {"str": "text"}.get(annotation.__name__, annotation.__name__)
    )
