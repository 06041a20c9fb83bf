"""All settings of a run: the recipe's sections, their cross-checks and the table of them."""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from pydantic import Field, create_model

from hypermoe_ds.checkpoint.settings import CheckpointConfig
from hypermoe_ds.config import PathText, Settings, apply_overrides, closest, load_yaml, validate
from hypermoe_ds.data.left_out import LeftOut
from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.data.tokenizer import embeddings_needed, load_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.monitor.settings import MonitorConfig
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.training.settings import EvaluationConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from hypermoe_ds.training.state import TrainState

if TYPE_CHECKING:
    from hypermoe_ds.modeling import HyperMoEConfig

_VOCABULARY_MULTIPLE = 128  # products with the embeddings are fastest on GPUs in multiples of it

# At 8 bytes each their index takes 80 GB; beyond, megatron-core counts epochs one by one for hours.
_MOST_SAMPLES = 10**10

# The tokenizer's, generation's or the export's.
_MODEL_SOURCE = Path(__file__).parent / "modeling/configuration_hypermoe.py"
_NOT_SETTINGS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "baked_hyper_experts")


@cache
def _vocabulary_for(tokenizer: str) -> int:
    """Return the vocabulary that a tokenizer folder needs; loaded once a process, since a launch asks several times."""
    needed = embeddings_needed(load_tokenizer(tokenizer))
    return -(-needed // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


class RunSection(Settings):
    """Where the run lives."""

    dir: PathText = Field(description="the run folder: settings, metrics, TensorBoard files and checkpoints")


class _Declared(NamedTuple):
    """A field of `HyperMoEConfig`."""

    kind: Any
    default: Any
    description: str


def _read_model_source() -> tuple[dict[str, _Declared], list[str]]:
    """The fields of `HyperMoEConfig` and the names of the presets, off the source.

    Importing it takes Transformers and torch, 3 s, and most mistakes in a recipe show without them.
    """
    tree = ast.parse(_MODEL_SOURCE.read_text(encoding="utf-8"))
    literal: Any = Literal
    kinds: dict[str, Any] = {"int": int, "float": float, "bool": bool}
    fields, presets = {}, []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
            choices = node.value.slice  # type: ignore[attr-defined]
            kinds[ast.unparse(node.targets[0])] = literal[ast.literal_eval(choices)]
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PRESETS":
            presets = [ast.literal_eval(key) for key in node.value.args[0].keys]  # type: ignore[union-attr]
        elif isinstance(node, ast.ClassDef) and node.name == "HyperMoEConfig":
            docs = (ast.get_docstring(node, clean=False) or "").partition("Args:\n")[2]
            described = dict(re.findall(r"^        (\w+): (.+?)(?=^        \w+:|^    \w|\Z)", docs, re.S | re.M))
            declared = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            for name, item in ((ast.unparse(item.target), item) for item in declared):
                if name not in _NOT_SETTINGS and item.value is not None:
                    kind, default = kinds[ast.unparse(item.annotation)], ast.literal_eval(item.value)
                    fields[name] = _Declared(kind, default, " ".join(described[name].split()).rstrip("."))
    return fields, presets


_MODEL_FIELDS, _PRESETS = _read_model_source()


def _model_fields() -> dict[str, Any]:
    """The fields of the model, each optional, so that a preset may stand below them."""
    fields: dict[str, Any] = {"preset": (str | None, Field(None, description=f"start from {', '.join(_PRESETS)}"))}
    for name, field in _MODEL_FIELDS.items():
        description = field.description
        if name == "vocab_size":
            description += (
                "; null takes the preset's, and without one the largest token id of data.tokenizer + 1, "
                f"rounded up to a multiple of {_VOCABULARY_MULTIPLE}"
            )
        fields[name] = (field.kind | None, Field(None, description=description))
    return fields


ModelSection = create_model("ModelSection", __base__=Settings, **_model_fields())


def model_section(config: "HyperMoEConfig") -> dict[str, Any]:
    """The section of a recipe that gives this model, with every field."""
    return {key: getattr(config, key) for key in ModelSection.model_fields if key != "preset"}


class RunConfig(Settings):
    """A recipe."""

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

    @property
    def last_step(self) -> int:
        """Step after which this start ends."""
        return min(self.train.steps, self.train.stop_at_step or self.train.steps)

    @property
    def left_out(self) -> LeftOut:
        """The samples that nobody trains on."""
        return LeftOut(self.train.skip_samples)

    def samples(self, state: TrainState) -> int:
        """Return how many places of the order of the training samples the run needs: consumed and still to come.

        The steps taken may have had other batch sizes.

        Raises:
            UserError: a stretch of `train.skip_samples` begins after the last sample, or there are more samples than an
                index of them can have.
        """
        to_come = max(self.train.steps - state.step, 0) * self.train.global_batch_size
        end = self.left_out.after(state.consumed_samples, to_come) if to_come else state.consumed_samples
        for first, last in self.train.skip_samples:
            if first >= end:
                problem = f"begins after the run's last sample, {end - 1}"
                raise UserError(f"train.skip_samples=[[{first}, {last}]]", problem, "leave it away or mend it")
        if end > _MOST_SAMPLES:
            problem = f"with train.global_batch_size and train.skip_samples needs {end:,} samples"
            raise UserError(f"train.steps={self.train.steps}", problem, f"stay below {_MOST_SAMPLES:,}")
        return end

    def architecture(self) -> "HyperMoEConfig":
        """The model: the preset, if one is named, with the recipe's fields over it.

        A vocabulary that neither gives is that of the tokenizer.

        Raises:
            UserError: an unknown preset, fields that do not fit each other, or a tokenizer that is needed and does not
                load.
        """
        given = {key: value for key, value in self.model.model_dump().items() if value is not None}
        preset = given.pop("preset", None)
        self._check_preset()
        from hypermoe_ds.modeling import PRESETS, HyperMoEConfig  # noqa: PLC0415 (takes seconds)

        fields = {**PRESETS.get(preset, {}), **given}
        if "vocab_size" not in fields:
            fields["vocab_size"] = _vocabulary_for(self.data.tokenizer)
        try:
            return HyperMoEConfig(**fields)
        except ValueError as error:
            where, _, rest = str(error).partition(": ")
            problem, _, remedy = rest.partition("; ")
            raise UserError(f"model.{where}", problem, remedy) from None

    def _check_preset(self) -> None:
        preset = self.model.preset  # type: ignore[attr-defined]
        if preset is not None and preset not in _PRESETS:
            raise UserError(f"model.preset={preset}", "is unknown", closest(preset, _PRESETS))

    def opening_line(self, world_size: int, step: int) -> str:
        """What is about to run, from `step` on."""
        model = self.architecture()
        counts = model.parameter_counts()
        idle = " | nothing to train: raise train.steps or train.stop_at_step to go on" * (step >= self.last_step)
        return (
            f"{counts.total / 1e6:,.1f} M parameters, {counts.active / 1e6:,.1f} M active, "
            f"{counts.hypernetwork / 1e6:,.1f} M in the hypernetwork, vocabulary {model.vocab_size:,} | "
            f"{world_size} ranks, expert parallelism {self.parallel.expert} | "
            f"step {step} of {self.train.steps} | {self.run.dir}{idle}"
        )

    def check(self) -> None:
        """Refuse sections that do not fit each other.

        Raises:
            UserError: the first misfit.
        """
        self._check_preset()
        for first, last in self.train.skip_samples:
            if first > last:
                raise UserError(f"train.skip_samples=[[{first}, {last}]]", "ends before it begins", "give first, last")
        self.monitor.check_installed()
        if self.optimizer.lr * self.optimizer.weight_decay >= 1:
            where = f"optimizer.weight_decay={self.optimizer.weight_decay}"
            # AdamW multiplies the weights by 1 - lr * weight_decay in each step.
            raise UserError(where, f"times optimizer.lr={self.optimizer.lr} is 1 or more", "lower it")
        ramps = self.schedule.warmup_steps + self.schedule.decay_steps
        if ramps > self.train.steps:
            raise UserError(
                f"schedule.warmup_steps={self.schedule.warmup_steps}",
                f"with decay_steps={self.schedule.decay_steps} longer than train.steps={self.train.steps}",
                "shorten them",
            )
        if self.schedule.name == "warmup_stable_decay" and self.schedule.decay_steps == 0:
            raise UserError("schedule.decay_steps=0", "warmup_stable_decay never decays", "give its last steps")
        longest = self.architecture().max_position_embeddings
        if self.data.sequence_length > longest:
            raise UserError(
                f"data.sequence_length={self.data.sequence_length}",
                f"longer than model.max_position_embeddings={longest}",
                "shorten the sequences or raise that limit",
            )


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply `section.key=value` overrides and check it.

    Raises:
        UserError: anything that is wrong with it, in one line.
    """
    config = validate(RunConfig, apply_overrides(load_yaml(path), overrides), str(path), overrides)
    config.check()
    return config


def settings_table() -> str:
    """Every setting of a recipe with its default and meaning, as a Markdown table."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for section, field in RunConfig.model_fields.items():
        rows += _rows(section, field.annotation)  # type: ignore[arg-type]
    return "\n".join(rows) + "\n"


def _rows(section: str, model: type[Settings]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        default = field.default
        if model is ModelSection and name in _MODEL_FIELDS and name != "vocab_size":
            default = _MODEL_FIELDS[name].default
        shown = "required" if field.is_required() else f"`{json.dumps(default)}`"
        yield f"| `{section}.{name}` | {shown} | {field.description} |"
        for item in get_args(field.annotation):
            if isinstance(item, type) and issubclass(item, Settings) and field.is_required():
                yield from _rows(f"{section}.{name}[]", item)
