"""Settings are strict: an unknown or invalid setting is refused with an error that names it."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from hypermoe_ds.config import Settings, apply_overrides, closest, load_yaml, validate
from hypermoe_ds.errors import UserError


class Dataset(Settings):
    prefix: str
    weight: float = 1.0


class Data(Settings):
    train: list[Dataset]
    valid: list[Dataset] | None = None
    sequence_length: int = Field(default=128, gt=0)


class Optimizer(Settings):
    lr: float
    betas: list[float] | None = None


class Job(Settings):
    data: Data
    optimizer: Optimizer
    warmup: Optimizer | None = None


def valid_settings() -> dict[str, Any]:
    return {"data": {"train": [{"prefix": "a"}], "sequence_length": 64}, "optimizer": {"lr": 3e-4}}


def write_recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_text(error: pytest.ExceptionInfo[UserError]) -> str:
    return str(error.value)


# Reading YAML


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.3e-3", "3.e-4", "+3e-4", "30e-5", "0.0003"])
def test_every_notation_of_a_float_is_read_as_a_float(tmp_path: Path, text: str) -> None:
    value = load_yaml(write_recipe(tmp_path, f"lr: {text}"))["lr"]
    assert isinstance(value, float)
    assert value == pytest.approx(3e-4, rel=1e-12)


@pytest.mark.parametrize("text", ["e-4", "3e", "3e-4x", "'3e-4'", "v3e4"])
def test_text_that_is_not_a_number_stays_text(tmp_path: Path, text: str) -> None:
    assert load_yaml(write_recipe(tmp_path, f"name: {text}"))["name"] == text.strip("'")


def test_integers_and_booleans_keep_their_type(tmp_path: Path) -> None:
    content = load_yaml(write_recipe(tmp_path, "steps: 1000\nuse: true\nnone: null"))
    assert content == {"steps": 1000, "use": True, "none": None}
    assert isinstance(content["steps"], int)


@pytest.mark.parametrize(
    ("text", "key"), [("lr: 1\nlr: 2", "lr"), ("a:\n  b: 1\n  b: 1", "b"), ("a: [{c: 1, c: 2}]", "c")]
)
def test_a_repeated_key_is_refused_at_any_depth(tmp_path: Path, text: str, key: str) -> None:
    path = write_recipe(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_yaml(path)
    assert f"key '{key}' is given twice" in error_text(error)
    assert str(path) in error_text(error)


def test_invalid_yaml_is_reported_with_file_and_line(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(UserError, match=r"is not valid YAML at line \d") as error:
        load_yaml(path)
    assert str(path) in error_text(error)


@pytest.mark.parametrize("text", ["", "- a\n- b", "just text"])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="is not a mapping"):
        load_yaml(write_recipe(tmp_path, text))


def test_an_unreadable_file_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: cannot be read"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path)  # the path is a folder
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize("text", ["? [a, b]\n: 1", "? {a: 1}\n: 1", "a: !!python/object:os.system {}", "a: *missing"])
def test_unsupported_yaml_is_refused_without_a_traceback(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        load_yaml(write_recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
        ("a: " + "{b: " * 5000 + "1" + "}" * 5000, "is nested too deeply"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n}, ' * 9}]\n" for n in range(60)),
            "expands to more than",
        ),
        (
            "a0: &a0 {x: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{b: *a{n}, c: *a{n}}}\n" for n in range(60)),
            "expands to",
        ),
        ("a: &a [*a]", "expands to more than 100,000 values"),
        (f"a: [{'1,' * 100_001}]", "expands to more than 100,000 values"),
        (f"a: {'1' * 5000}", "is not valid YAML (Exceeds the limit"),
        ("a: 2001-99-99", "is not valid YAML (month must be in 1..12"),
        ("a: !!int x", "is not valid YAML ("),
        ("a: !!bool x", "is not valid YAML ("),
        ("a: !!timestamp x", "is not valid YAML ("),
    ],
    ids=lambda text: text[:30],
)
def test_malicious_yaml_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_yaml(write_recipe(tmp_path, text))
    assert message in error_text(refused)
    assert "\n" not in error_text(refused)
    override = text.partition(": ")[2].strip()
    if "\n" not in override and "&" not in override:
        with pytest.raises(UserError, match=r"^a="):
            apply_overrides({}, [f"a={override}"])


def test_a_number_and_its_text_are_different_keys(tmp_path: Path) -> None:
    assert load_yaml(write_recipe(tmp_path, "a: {1: x, '1': y}")) == {"a": {1: "x", "1": "y"}}


def test_an_anchor_may_be_used_more_than_once(tmp_path: Path) -> None:
    content = load_yaml(write_recipe(tmp_path, "base: &b {x: 1}\na: *b\nc:\n  <<: *b\n  y: 2"))
    assert content == {"base": {"x": 1}, "a": {"x": 1}, "c": {"x": 1, "y": 2}}


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("3e-4", 3e-4),
        ("2", 2),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("{x: 1}", {"x": 1}),
        ("a=b", "a=b"),
    ],
)
def test_the_value_of_an_override_is_read_as_yaml(override: str, value: object) -> None:
    result = apply_overrides({}, [f"section.key={override}"])
    assert result == {"section": {"key": value}}
    assert type(result["section"]["key"]) is type(value)


def test_an_override_replaces_one_key_and_the_last_override_wins() -> None:
    result = apply_overrides(valid_settings(), ["optimizer.lr=1e-3", "data.sequence_length=32", "optimizer.lr=2e-3"])
    assert result == {"data": {"train": [{"prefix": "a"}], "sequence_length": 32}, "optimizer": {"lr": 2e-3}}


def test_overrides_do_not_modify_the_original_settings() -> None:
    settings = {"a": {"b": {"c": 1}}, "d": 1}
    apply_overrides(settings, ["a.b.c=2", "d=3", "a.e=4"])
    assert settings == {"a": {"b": {"c": 1}}, "d": 1}


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", ".lr=3", "optimizer.=3", "a..b=1", ""])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"is not an override; write section\.key=value"):
        apply_overrides(valid_settings(), [override])


def test_an_override_inside_a_plain_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr\.x=1: 'lr' is not a section"):
        apply_overrides(valid_settings(), ["optimizer.lr.x=1"])


def test_an_override_with_invalid_yaml_is_reported() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr=\[1.*not valid YAML"):
        apply_overrides(valid_settings(), ["optimizer.lr=[1"])


# Validation


def test_valid_settings_become_typed_and_frozen() -> None:
    job = validate(Job, valid_settings(), "r.yaml")
    assert job.data.train[0].weight == 1.0
    with pytest.raises(ValidationError):
        job.optimizer.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "key", "dotted", "nearest"),
    [
        ((), "optimiser", "optimiser", "optimizer"),
        (("data",), "sequence_lenght", "data.sequence_lenght", "sequence_length"),
        (("data", "train", 0), "wieght", "data.train.0.wieght", "weight"),
        (("data", "valid", 0), "prefx", "data.valid.0.prefx", "prefix"),
        (("optimizer",), "beta", "optimizer.beta", "betas"),
        (("warmup",), "lrr", "warmup.lrr", "lr"),
    ],
)
def test_an_unknown_key_is_reported_with_the_most_similar_known_key(
    path: tuple[str | int, ...], key: str, dotted: str, nearest: str
) -> None:
    content = valid_settings() | {"warmup": {"lr": 1.0}}
    content["data"]["valid"] = [{"prefix": "b"}]
    section: Any = content
    for part in path:
        section = section[part]
    section[key] = 1
    with pytest.raises(UserError) as error:
        validate(Job, content, "r.yaml")
    assert error_text(error) == f"r.yaml: {dotted}: unknown key; did you mean '{nearest}'?"


def test_a_misspelt_key_is_reported_before_the_missing_key() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lrate: unknown key"):
        validate(Job, valid_settings() | {"optimizer": {"lrate": 1.0}}, "r.yaml")


def test_a_missing_key_is_reported_with_its_dotted_name() -> None:
    with pytest.raises(UserError, match=r"^r\.yaml: optimizer\.lr: is missing"):
        validate(Job, valid_settings() | {"optimizer": {}}, "r.yaml")


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        ("optimizer", {"lr": "3e-4"}, r"optimizer\.lr='3e-4': is not valid"),
        ("optimizer", {"lr": True}, r"optimizer\.lr=True: is not valid"),
        ("data", {"train": [], "sequence_length": 0}, r"data\.sequence_length=0: is not valid"),
        ("data", {"train": [], "sequence_length": 8.0}, r"data\.sequence_length=8\.0: is not valid"),
        ("data", {"train": [{"prefix": 3}]}, r"data\.train\.0\.prefix=3: is not valid"),
        ("data", 5, r"data=5: is not valid"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_not_converted(section: str, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Job, valid_settings() | {section: content}, "r.yaml")


def test_settings_that_are_not_a_mapping_are_refused() -> None:
    with pytest.raises(UserError, match=r"^r\.yaml=\[\]: is not valid"):
        validate(Job, [], "r.yaml")


def test_an_integer_is_accepted_for_a_float() -> None:
    assert validate(Optimizer, {"lr": 1}, "r.yaml").lr == 1.0


def test_without_a_similar_name_the_remedy_lists_all_known_names() -> None:
    assert closest("zzz", ["lr", "betas"]) == "known: betas, lr"
    assert closest("beta", ["lr", "betas"]) == "did you mean 'betas'?"
