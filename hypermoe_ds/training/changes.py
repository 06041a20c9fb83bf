"""Report the settings that changed since the last launch and the effect of each change."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.config import validate
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.training.ds_config import without_owned_by_recipe
from hypermoe_ds.training.same_settings import flat
from hypermoe_ds.training.settings import ScheduleConfig

_NOT_IN_RESULTS = "results stay the same"
_ROUNDING = "memory and speed change; results stay the same up to rounding"

# If several keys are prefixes of a setting's name, the effect of the longest key applies.
_EFFECTS: Mapping[str, str] = MappingProxyType(
    {
        "run.dir": _NOT_IN_RESULTS,
        "model": "the model stays the same",
        "data.train": "with data.on_change=continue, each dataset is read from where the run left off",
        "data.sequence_length": "the text is split into other samples, so parts of an epoch are read twice or never",
        "data.stages": "later stages follow the new plan",
        "data.document_mask": "attention and the predicted tokens change from now on",
        "data.valid": "validation losses are measured on different data",
        "data.tokenizer": "the run keeps the tokenizer that its first launch copied",
        "data": _NOT_IN_RESULTS,
        "train": _NOT_IN_RESULTS,
        "train.steps": "the schedule spans the new number of steps",
        "train.stop_at_step": "this launch ends at a different step",
        "train.micro_batch_size": _ROUNDING + ", and the routing losses average over different micro-batches",
        "train.global_batch_size": "steps use the new batch size from now on; the learning rate does not change",
        "train.seed": "the order of the training samples changes, so parts of an epoch are read twice or never",
        "train.precision": "training continues from the fp32 weights; losses change by rounding",
        "train.clip_grad_norm": "gradients are clipped at the new norm",
        "train.activation_checkpointing": _ROUNDING,
        "train.skip_samples": "these samples are skipped from now on",
        "optimizer.lr": "the schedule continues with the new peak learning rate",
        "optimizer": "takes effect in the next step; the moments are kept",
        "schedule": "the learning rate follows the new schedule from the next step",
        "parallel": _ROUNDING,
        "checkpoint": _NOT_IN_RESULTS,
        "evaluation": "validation runs at different steps or on different samples",
        "monitor": _NOT_IN_RESULTS,
        "deepspeed": _ROUNDING,
    }
)


def record_launch(
    run: RunFolder,
    settings: dict[str, Any],
    ds_config: dict[str, Any],
    model: HyperMoEConfig,
    step: int,
    log: Callable[[str], None],
) -> None:
    """Write the settings to `resolved/`; on a resume, first print those that changed since the last launch.

    If the last launch's settings cannot be read, for example after a power failure, print a warning instead.

    Args:
        run: the run folder.
        settings: the resolved recipe.
        ds_config: the DeepSpeed configuration.
        model: configuration of the model.
        step: number of optimizer steps that the run has taken.
        log: function that prints a line.
    """
    if step and run.settings.is_file() and run.ds_config.is_file():
        try:
            previous = json.loads(run.ds_config.read_text())
            lines = setting_changes(run.read_settings(), settings, previous, ds_config, step)
        except (UserError, OSError, ValueError, TypeError, AttributeError, RecursionError):
            where = f"{run.settings} or {run.ds_config.name}"
            lines = [f"warning: {where} is damaged: changes since the last launch are unknown; both files are replaced"]
        for line in lines:
            log(line)
    run.write_settings(settings, ds_config, model, Path(settings["data"]["tokenizer"]))


def setting_changes(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    old_deepspeed: Mapping[str, Any],
    new_deepspeed: Mapping[str, Any],
    step: int,
) -> list[str]:
    """Describe each setting that has changed since the last launch in one line, with the effect of the change.

    Args:
        old: the resolved recipe of the last launch.
        new: the resolved recipe of this launch.
        old_deepspeed: the DeepSpeed configuration of the last launch.
        new_deepspeed: the DeepSpeed configuration of this launch.
        step: number of optimizer steps that the run has taken.

    Returns:
        One line per changed setting, and one more if the learning rate of the next step changes.
    """
    before = _settings(old, old_deepspeed)
    after = _settings(new, new_deepspeed)
    lines = [
        f"changed since the last launch: {key} {_short(before.get(key))} -> {_short(after.get(key))}: {_effect(key)}"
        for key in {**before, **after}
        if before.get(key, "null") != after.get(key, "null")
    ]
    with suppress(UserError, KeyError, TypeError, ValueError):  # the last launch recorded no valid schedule
        lines += _rate_line(_Rates(old), _Rates(new), step)
    return lines


def _settings(recipe: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> dict[str, str]:
    """Return all settings as JSON by dotted name; omit `train.tokens`, because `train.steps` determines it."""
    settings = dict(flat(_without_nulls({**recipe, "deepspeed": without_owned_by_recipe(deepspeed)})))
    settings.pop("train.tokens", None)
    return settings


def _without_nulls(value: Any) -> Any:
    """Remove nulls from the items of lists, because items written by an older version may lack newer settings."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [
            {key: part for key, part in item.items() if part is not None} if isinstance(item, Mapping) else item
            for item in value
        ]
    return value


def _effect(key: str) -> str:
    parts = key.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((_EFFECTS[prefix] for prefix in prefixes if prefix in _EFFECTS), "takes effect from now on")


def _short(value: str | None) -> str:
    """Return the JSON value, truncated to 80 characters, or "unset"."""
    value = value or "unset"
    return value if len(value) <= 80 else f"{value[:77]}..."


class _Rates:
    """The learning rates of a recipe."""

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        self._peak = float(recipe["optimizer"]["lr"])
        self._schedule = validate(ScheduleConfig, recipe["schedule"], "schedule")
        self._steps = int(recipe["train"]["steps"])

    def of(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 1."""
        return self._peak * self._schedule.factor(step, self._steps)

    def has_decayed(self, step: int) -> bool:
        """Return whether the learning rate has started to decay by this step."""
        return step > self._schedule.warmup_steps and self.of(step) < self._peak


def _rate_line(old: _Rates, new: _Rates, step: int) -> Iterator[str]:
    planned, current, previous = old.of(step + 1), new.of(step + 1), old.of(step)
    if planned == current:
        return
    line = f"learning rate of step {step + 1}: {current:.3e} instead of {planned:.3e}; step {step} had {previous:.3e}"
    if old.has_decayed(step) and current > previous:
        line = f"warning: the learning rate rises again after it had fallen, which can raise the loss; {line}"
    yield line
