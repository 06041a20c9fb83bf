"""Read the files of a Hugging Face folder without running its code or following symbolic links out of it.

The content is checked before it is used: numbers in JSON files are bounded, and only regular files inside the folder
are opened.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, create_model

from hypermoe_ds.errors import UserError
from hypermoe_ds.files import file_of
from hypermoe_ds.modeling import ConfigurationError, HyperMoEConfig, state_dict_shapes

CONFIG = "config.json"
_LARGEST_JSON = 2**26  # bytes; an index of 100,000 tensors is 10 MB
FETCH_AGAIN = "export or fetch the folder again"

# Upper limits far above any real model, but low enough that building a model on the meta device stays fast.
_LARGEST_NUMBER = 2**40
_LIMITS = {"num_hidden_layers": 10_000, "num_experts": 65_536, "num_local_experts": 65_536}

_types: dict[str, Any] = {name: (kind, None) for name, kind in HyperMoEConfig.__annotations__.items()}
_types["eos_token_id"] = (int | list[int] | None, None)  # chat models have several end-of-sequence tokens
_Fields = create_model("_Fields", __config__=ConfigDict(strict=True, allow_inf_nan=False), **_types)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file in the folder.

    Raises:
        UserError: the file is missing, larger than 64 MiB, damaged or not a JSON object.
    """
    path = file_of(folder, name)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(str(path), f"is larger than {_LARGEST_JSON / 2**20:.0f} MiB", FETCH_AGAIN)
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(str(path), "is nested too deeply", FETCH_AGAIN) from None
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", FETCH_AGAIN) from None
    if not isinstance(content, dict):
        raise UserError(str(path), "is not a JSON object", FETCH_AGAIN)
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder.

    Raises:
        UserError: the file is missing or damaged, or contains an implausibly large number.
    """
    if not (folder / CONFIG).exists():
        raise UserError(str(folder / CONFIG), "is missing", "give a Hugging Face folder")
    content = read_json(folder, CONFIG)
    for key, value in content.items():
        limit = _LIMITS.get(key, _LARGEST_NUMBER)
        if isinstance(value, int | float) and value > limit:
            raise UserError(f"{folder / CONFIG}: {key}={short(value)}", f"is more than {limit:,}", "correct that key")
    return content


def read_hypermoe_config(folder: Path) -> HyperMoEConfig:
    """Read the config.json of a HyperMoE model; ignore unknown keys.

    Raises:
        UserError: `read_config` refuses the file, the file does not describe a HyperMoE model, or a value has the wrong
            type or does not match the others.
    """
    content, path = read_config(folder), folder / CONFIG
    kind = content.get("model_type")
    if kind != HyperMoEConfig.model_type:
        raise UserError(
            f"{path}: model_type={short(kind)}", "is not a HyperMoE model", "give an exported HyperMoE model"
        )
    return hypermoe_config(folder, content)


def hypermoe_config(folder: Path, fields: Mapping[str, Any]) -> HyperMoEConfig:
    """Build the configuration of a folder's model; ignore unknown fields.

    Raises:
        UserError: a value has the wrong type or does not match the others.
    """
    path = folder / CONFIG
    try:
        config: HyperMoEConfig = HyperMoEConfig(**_Fields.model_validate(fields).model_dump(exclude_unset=True))
    except ValidationError as failure:
        error = failure.errors()[0]
        where = f"{path}: {error['loc'][0]}={short(error['input'])}"
        raise UserError(where, "is not valid", short(error["msg"])) from None
    except ConfigurationError as error:
        raise UserError(f"{path}: {error.where}", error.problem, error.remedy) from None
    except ValueError as error:  # Transformers' own checks
        raise UserError(str(path), f"is not valid ({last_line(error)})", "correct that key") from None
    return config


def last_line(error: Exception) -> str:
    """Return the last line of a library's error message, truncated to 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:200]


def checked_shapes(folder: Path, model_config: HyperMoEConfig, stored: Collection[str]) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors, after checking that the stored weights have enough layers.

    Args:
        folder: the folder with the weights.
        model_config: configuration of the model.
        stored: names of the stored tensors. Their layers are counted before the model is built, so that a wrong
            `num_hidden_layers` is found first.

    Raises:
        UserError: the weights have fewer layers than the configuration, or a tensor is too large to address.
    """
    layers = len({match[1] for name in stored if (match := re.match(r"model\.layers\.(\d+)\.", name))})
    if layers < model_config.num_hidden_layers:
        problem = (
            f"has weights of {layers} layers, but config.json has num_hidden_layers={model_config.num_hidden_layers}"
        )
        raise UserError(str(folder), problem, "correct config.json")
    try:
        return state_dict_shapes(model_config)
    except RuntimeError as error:  # the size of a tensor overflows
        problem = f"has a config.json that describes impossible tensors ({last_line(error)})"
        raise UserError(str(folder), problem, "correct config.json") from None


def short(value: object) -> str:
    """Format a value for a message, truncated to 80 characters."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
