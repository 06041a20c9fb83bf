"""Load YAML files and `section.key=value` overrides into frozen, strictly typed settings."""

import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from hypermoe_ds.errors import UserError

LARGEST_COUNT = 10**9  # upper limit for counts such as steps; the product of two such counts fits in 64 bits


class Settings(BaseModel):
    """Base class of all settings, which are frozen and strictly typed and reject unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _check_path(text: str) -> str:
    if not text:
        raise ValueError("Path should not be empty")  # pathlib treats "" as the working directory
    if (
        "\0" in text
        or len(os.fsencode(text)) > _LONGEST_PATH
        or any(len(os.fsencode(name)) > _LONGEST_NAME for name in text.split("/"))
    ):
        raise ValueError("Path should not contain a null byte or exceed the length limits of Linux")
    return text


_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes, on Linux
PathText = Annotated[str, AfterValidator(_check_path)]
Section = TypeVar("Section", bound=Settings)

_MOST_VALUES = 100_000  # limit per file, because nested aliases can expand to exponentially many values
_MERGE = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML loader that rejects duplicate keys and unbounded aliases, and parses `3e-4` as a float.

    YAML 1.1 parses `3e-4` as a string.
    """

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values_in(node, {}) > _MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"it expands to more than {_MOST_VALUES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = None if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' is given twice", problem_mark=key_node.start_mark)
            if isinstance(key, str | int | float):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _values_in(node: yaml.Node, known: dict[int, float]) -> float:
    """Return the number of values in a node after expanding its aliases; infinity if the node contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # the count of a node that contains itself stays infinite
        parts: list[yaml.Node] = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    return known[id(node)]


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML, repeats a key, is nested too deeply, expands to more than 100,000
            values or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give the path of a YAML recipe") from None
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise UserError(str(path), "is not a mapping of sections", "start from a file in pretrain/recipes")
    return content


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(where, f"is not valid YAML{line} ({problem})", "fix that line") from None
    except RecursionError:
        raise UserError(where, "is nested too deeply", "start from a file in pretrain/recipes") from None
    # PyYAML's constructors raise many kinds of errors, for example for !!int x or 2001-99-99.
    except Exception as error:
        raise UserError(where, f"is not valid YAML ({error})", "fix that value") from None


def apply_overrides(settings: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `settings` with `section.key=value` overrides applied; values are YAML.

    Raises:
        UserError: an override has no `=`, has an empty key, or sets a key inside a value that is not a section.
    """
    result: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()}
    for override in overrides:
        dotted, separator, text = override.partition("=")
        *parents, leaf = dotted.split(".")
        if not separator or not leaf or not all(parents):
            raise UserError(override, "is not an override", "write section.key=value")
        section = result
        for parent in parents:
            child = section.get(parent, {})
            if not isinstance(child, dict):
                raise UserError(override, f"'{parent}' is not a section", "write section.key=value")
            section[parent] = dict(child)
            section = section[parent]
        section[leaf] = _parse(text, override)
    return result


def closest(name: str, known: Iterable[str]) -> str:
    """Return a remedy for an unknown name: the most similar known name, or all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def validate(model: type[Section], content: object, source: str, overrides: Iterable[str] = ()) -> Section:
    """Validate plain data and build the settings object.

    Args:
        model: class of the settings object.
        content: the data, with overrides applied.
        source: file that the data was read from, for error messages.
        overrides: the overrides; an error message about an overridden value does not name the file.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type. The error names the first such key.
    """
    try:
        return model.model_validate(content)
    except ValidationError as failure:
        errors = failure.errors()
    # Report an unknown key first, because it is often a misspelling of a missing key.
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    path = ".".join(map(str, error["loc"]))
    where = path if _is_overridden(path, error["type"], overrides) else ": ".join(filter(None, (source, path)))
    if error["type"] == "extra_forbidden":
        raise UserError(where, "unknown key", closest(str(error["loc"][-1]), _fields_at(model, error["loc"][:-1])))
    if error["type"] == "missing":
        raise UserError(where, "is missing", "add this key")
    raise UserError(f"{where}={error['input']!r}", "is not valid", error["msg"].removeprefix("Value error, "))


def _is_overridden(path: str, kind: str, overrides: Iterable[str]) -> bool:
    """Return whether an override set the value at `path` or created the unknown section at `path`."""
    keys = [f"{override.partition('=')[0]}." for override in overrides]
    creates = kind == "extra_forbidden"
    return any(f"{path}.".startswith(key) or (creates and key.startswith(f"{path}.")) for key in keys)


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Return the field names of the (nested) model at `path`."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # `part` is an index into a list of models
        model = _models_in(field.annotation)[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
