"""Every recipe in the repository loads, and an invalid setting is refused with an error that names it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import tokenizers
import yaml

from hypermoe_ds.config import Settings
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import PRESETS, HyperMoEConfig
from hypermoe_ds.run_config import ModelSection, RunConfig, load_run_config, settings_help, settings_table
from hypermoe_ds.training.state import TrainState

RECIPES = sorted((Path(__file__).parents[2] / "pretrain" / "recipes").glob("*.yaml"))
SMALL = {
    "run": {"dir": "x"},
    "model": {"vocab_size": 64, "max_position_embeddings": 32},
    "data": {"train": [{"prefix": "a"}], "sequence_length": 32, "tokenizer": "t"},
    "train": {"steps": 10, "micro_batch_size": 1, "global_batch_size": 1},
    "optimizer": {"lr": 1e-3},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def error_message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_run_config(recipe, overrides).build_model_config()
    text = str(refused.value)
    assert "\n" not in text
    assert re.match(r".+: .+; .+", text), "expected LOCATION: PROBLEM; REMEDY"
    return text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_loads(path: Path) -> None:
    config = load_run_config(path)
    assert config.build_model_config().max_position_embeddings >= config.data.sequence_length
    assert config.last_step == config.train.steps
    assert config.build_model_config().num_experts % config.parallel.expert == 0


def test_fields_of_the_recipe_override_the_preset(recipe: Path) -> None:
    for preset, fields in PRESETS.items():
        model = load_run_config(recipe, [f"model.preset={preset}", "model.adapter_size=5"]).build_model_config()
        expected = HyperMoEConfig(**{**fields, **SMALL["model"], "adapter_size": 5})  # type: ignore[dict-item]
        assert model.to_dict() == expected.to_dict()


def test_without_a_preset_the_defaults_of_the_model_apply(recipe: Path) -> None:
    assert load_run_config(recipe).build_model_config().to_dict() == HyperMoEConfig(**SMALL["model"]).to_dict()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.preset=tiny-10", "model.preset=tiny-10: is unknown; did you mean 'tiny-10m'?"),
        ("model.preset=zzz", "known: 3b-a0.4b, 7b-a1b, gpt2-small-8e, tiny-10m"),
        ("model.num_experts_per_tok=9", "model.num_experts_per_tok=9: more than num_experts=8; choose 1 to 8"),
        ("model.hidden_size=0", "model.hidden_size=0: too small; give at least 1"),
        ("model.num_key_value_heads=5", "model.num_key_value_heads=5: does not divide num_attention_heads=12"),
        ("model.head_dim=7", "model.head_dim=7: odd"),
        ("model.hiden_size=8", "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("model.hidden_size=wide", "model.hidden_size='wide': is not valid"),
        ("model.router_aux_loss_scope=all", "model.router_aux_loss_scope='all': is not valid"),
        ("model.use_cache=true", "model.use_cache: unknown key"),
        ("data.sequence_length=33", "data.sequence_length=33: is longer than model.max_position_embeddings=32; "),
        ("data.train=[]", "data.train=[]: is not valid"),
        ("data.train=[{prefix: a, weigth: 2}]", "data.train.0.weigth: unknown key; did you mean 'weight'?"),
        ("schedule.warmup_steps=11", "schedule.warmup_steps=11: together with decay_steps=0 exceeds train.steps"),
        ("schedule.name=warmup_stable_decay", "schedule.decay_steps=0: warmup_stable_decay would never decay;"),
        ("schedule.name=cosin", "schedule.name='cosin': is not valid"),
        ("train.precision=fp8", "train.precision='fp8': is not valid"),
        ("train.clip_grad_norm=-1", "train.clip_grad_norm=-1: is not valid"),
        ("train.stop_at_step=0", "train.stop_at_step=0: is not valid"),
        ("train.skip_samples=[[5, 4]]", "train.skip_samples=[[5, 4]]: ends before it begins; give first, last"),
        ("train.skip_samples=[[4]]", "train.skip_samples.0=[4]: is not valid"),
        ("train.steps=", "train.steps: is missing, and so is train.tokens; give one of them"),
        ("train.tokens=1000", "train.tokens=1000: takes 32 steps, but train.steps is 10; give only one of them, and"),
        ("train.tokens=1.5", "train.tokens=1.5: is not valid"),
        ("train.tokens=-5", "train.tokens=-5: is not valid"),
        ("train.tokens=many", "train.tokens='many': is not valid"),
        ("train.step=3", "train.step: unknown key; did you mean 'steps'?"),
        ("optimizer.lr=0", "optimizer.lr=0: is not valid"),
        (
            "optimizer.weight_decay=1000",
            "optimizer.weight_decay=1000.0: its product with optimizer.lr=0.001 is 1 or more; lower it",
        ),
        ("train.seed=4294967296", "train.seed=4294967296: is not valid"),
        ("checkpoint.resume=maybe", "checkpoint.resume='maybe': is not valid"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0: is not valid"),
        ("monitor.profile_steps=[3, 2]", "monitor.profile_steps=[3, 2]: ends before it begins; give first, last"),
        ("monitor.profile_steps=[3]", "monitor.profile_steps=[3]: is not valid"),
        ("monitor.memory_snapshot=true", "monitor.memory_snapshot=true: needs profiled steps, but there are none"),
        ("monitor.interval=0", "monitor.interval=0: is not valid"),
        ("evaluation.intervall=3", "evaluation.intervall: unknown key; did you mean 'interval'?"),
        ("steps=3", "steps: unknown key"),
        ("train.steps", "train.steps: is not an override; write section.key=value"),
    ],
)
def test_inconsistent_settings_are_refused_in_one_line(recipe: Path, override: str, message: str) -> None:
    assert message in error_message(recipe, override)


def numeric_settings(model: type[Settings], prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the dotted name and type of each numeric setting."""
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Settings):
                yield from numeric_settings(kind, f"{prefix}{name}.")
            elif kind in (int, float):
                yield f"{prefix}{name}", kind


NUMERIC_SETTINGS = dict(numeric_settings(RunConfig))
OUT_OF_RANGE = ("-1", ".nan", ".inf", "-.inf", "1e300", str(10**30), "true", "'3'")


@pytest.mark.parametrize("key", NUMERIC_SETTINGS)
def test_numbers_must_be_finite_within_limits_and_of_the_right_type(recipe: Path, key: str) -> None:
    section, leaf = key.rsplit(".", 1)
    for value in OUT_OF_RANGE:
        if section in ("data.train", "data.valid", "data.stages"):
            required = "from_step: 2" if section == "data.stages" else "prefix: a"
            item = f"{leaf}: {value}" if required.startswith(leaf) else f"{required}, {leaf}: {value}"
            assert f"{section}.0.{leaf}=" in error_message(recipe, f"{section}=[{{{item}}}]")
        else:
            assert error_message(recipe, f"{key}={value}").startswith(f"{key}=")


@pytest.mark.parametrize("key", ["run.dir", "data.tokenizer", "data.train.prefix"])
@pytest.mark.parametrize("value", ["''", '"a\\0b"', "x" * 256, "x/" * 2100])
def test_invalid_paths_are_refused(recipe: Path, key: str, value: str) -> None:
    if key == "data.train.prefix":
        assert "data.train.0.prefix=" in error_message(recipe, f"data.train=[{{prefix: {value}}}]")
    else:
        assert error_message(recipe, f"{key}={value}").startswith(f"{key}=")


def test_the_rendezvous_timeout_is_at_least_one_second(recipe: Path) -> None:
    assert error_message(recipe, "train.collective_timeout=0.9").startswith(
        "train.collective_timeout=0.9: is not valid"
    )


def test_the_tested_numeric_settings_cover_every_section() -> None:
    sections = {key.partition(".")[0] for key in NUMERIC_SETTINGS}
    assert sections == RunConfig.model_fields.keys() - {"run"}
    assert NUMERIC_SETTINGS["train.consistency_interval"] is int
    assert NUMERIC_SETTINGS["data.train.weight"] is float


@pytest.mark.parametrize(
    ("train", "override", "message"),
    [
        ({"stepz": 5}, "optimizer.lr=2", "recipe.yaml: train.stepz: unknown key"),
        ({"steps": 0}, "train.seed=2", "recipe.yaml: train.steps=0: is not valid"),
        ({}, "train.stepz=5", "train.stepz: unknown key"),
        ({}, "trian.steps=5", "trian: unknown key; did you mean 'train'?"),
        ({}, "train.skip_samples=[[4]]", "train.skip_samples.0=[4]: is not valid"),
        ({}, "train={steps: 0}", "train.steps=0: is not valid"),
    ],
)
def test_an_error_in_an_override_does_not_name_the_recipe(
    recipe: Path, train: dict[str, int], override: str, message: str
) -> None:
    recipe.write_text(yaml.safe_dump(SMALL | {"train": SMALL["train"] | train}))
    assert error_message(recipe, override).removeprefix(f"{recipe.parent}/").startswith(message)


def test_warmup_and_decay_must_fit_into_the_run(recipe: Path) -> None:
    ramps = ["schedule.name=warmup_stable_decay", "schedule.warmup_steps=4"]
    assert load_run_config(recipe, [*ramps, "schedule.decay_steps=6"]).schedule.decay_steps == 6
    assert "together with decay_steps=7 exceeds train.steps=10" in error_message(
        recipe, *ramps, "schedule.decay_steps=7"
    )


@pytest.mark.parametrize("section", ["run", "model", "data", "train", "optimizer"])
def test_a_section_without_defaults_is_required(tmp_path: Path, section: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in SMALL.items() if key != section}))
    assert error_message(path) == f"{path}: {section}: is missing; add this key"


def test_overrides_change_only_the_settings_they_name(recipe: Path) -> None:
    config = load_run_config(recipe, ["train.steps=20", "optimizer.lr=3e-4", "data.valid=[{prefix: b}]"])
    assert (config.train.steps, config.optimizer.lr) == (20, 3e-4)
    assert [dataset.prefix for dataset in config.data.valid] == ["b"]
    changed = {"train": config.train, "optimizer": config.optimizer, "data": config.data}
    assert config.model_copy(update=changed) == load_run_config(recipe).model_copy(update=changed)


@pytest.mark.parametrize(("stop", "last"), [("null", 10), ("4", 4), ("10", 10), ("40", 10)])
def test_a_launch_ends_at_stop_at_step_or_at_the_end_of_the_run(recipe: Path, stop: str, last: int) -> None:
    assert load_run_config(recipe, [f"train.stop_at_step={stop}"]).last_step == last


# Table of settings


def fields(section: str, model: type[Settings]) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{section}.{name}", field


def all_fields() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, field in RunConfig.model_fields.items():
        found |= dict(fields(section, field.annotation))  # type: ignore[arg-type]
    return found


def test_every_setting_has_a_row_with_its_default_and_description() -> None:
    rows = [line.split(" | ") for line in settings_table().splitlines()[2:]]
    names = {row[0].strip("| `"): row for row in rows}
    assert len(names) == len(rows)
    assert names.keys() >= all_fields().keys()
    for name, field in all_fields().items():
        default, description = names[name][1], names[name][2]
        assert (default == "required") == field.is_required()
        assert field.description
        assert field.description in description
    assert names["model.num_experts"][1] == "`8`"
    assert names["train.precision"][1] == '`"bf16"`'
    assert names["checkpoint.keep_last"][1] == "`2`"


CHOICES = ("router_dtype", "router_aux_loss_scope", "hyper_conditioning", "qk_norm_scope")


def test_the_model_section_lists_the_fields_of_the_model() -> None:
    names = set(HyperMoEConfig.__annotations__) - {
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "baked_hyper_experts",
    }
    assert set(ModelSection.model_fields) == names | {"preset"}
    for name in names:
        field = ModelSection.model_fields[name]
        assert type(getattr(HyperMoEConfig, name)) in get_args(field.annotation) or name in CHOICES
        assert " " in (field.description or ""), "the description must be a phrase"
        assert not any(f"{other}: " in field.description for other in names), (
            "the description must describe only one setting"
        )


def test_a_run_needs_its_consumed_and_its_remaining_samples(recipe: Path) -> None:
    config = load_run_config(recipe, ["train.global_batch_size=4"])
    assert config.samples(TrainState()) == 40
    assert config.samples(TrainState(step=6, consumed_samples=24)) == 40
    assert config.samples(TrainState(step=6, consumed_samples=96)) == 96 + 16, (
        "6 steps have used 16 samples each, and 4 remaining steps use 4 each"
    )
    assert config.samples(TrainState(step=12, consumed_samples=48)) == 48, "the run has passed train.steps"
    with_skips = load_run_config(recipe, ["train.skip_samples=[[3, 4], [8, 8]]"])
    assert with_skips.samples(TrainState()) == 13
    assert with_skips.samples(TrainState(step=4, consumed_samples=6)) == 13


def test_skipped_samples_beyond_the_end_are_refused(recipe: Path) -> None:
    config = load_run_config(recipe, ["train.skip_samples=[[3, 4], [42, 43]]"])
    with pytest.raises(UserError, match=r"skip_samples=\[\[42, 43\]\]: begins after the run's last sample, 11; remove"):
        config.samples(TrainState())
    assert config.samples(TrainState(step=5, consumed_samples=40)) == 47, (
        "5 steps have used 8 samples each, 5 remaining steps use 1 each, and 2 are skipped"
    )


@pytest.mark.parametrize(
    "override", ["train.skip_samples=[[0, 1000000000000000000]]", "train.global_batch_size=1000000000"]
)
def test_more_samples_than_an_index_supports_are_refused(recipe: Path, override: str) -> None:
    config = load_run_config(recipe, [override, "train.steps=10000000"])
    with pytest.raises(
        UserError, match=r"^train\.steps=10000000: needs [0-9,]+ samples, given .*; stay below 1,000,000,000,000,000"
    ):
        config.samples(TrainState())


def test_a_wandb_project_without_the_wandb_package_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypermoe_ds.monitor.settings.find_spec", lambda _: None)
    assert error_message(recipe, "monitor.wandb_project=p") == (
        "monitor.wandb_project=p: the package wandb is not installed; pip install wandb, or remove this setting"
    )
    monkeypatch.setattr("hypermoe_ds.monitor.settings.find_spec", lambda _: "found")
    assert load_run_config(recipe, ["monitor.wandb_project=p"]).monitor.wandb_project == "p"


def write_tokenizer(folder: Path, largest_id: int) -> None:
    """Write a tokenizer folder with four tokens, whose ids are 0, 1, 2 and `largest_id`."""
    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": largest_id}, unk_token="<unk>")
    folder.mkdir()
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("largest_id", "vocabulary"), [(127, 128), (128, 256), (300, 384)])
def test_the_default_vocabulary_size_is_the_tokenizers_rounded_up_to_a_multiple_of_128(
    tmp_path: Path, largest_id: int, vocabulary: int
) -> None:
    write_tokenizer(tmp_path / "tokenizer", largest_id)
    recipe = SMALL | {"model": {"max_position_embeddings": 32}}
    recipe["data"] = {**SMALL["data"], "tokenizer": str(tmp_path / "tokenizer")}  # type: ignore[dict-item]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = load_run_config(tmp_path / "recipe.yaml")
    assert config.build_model_config().vocab_size == vocabulary
    assert config.model.vocab_size is None, "the recipe itself does not change"  # type: ignore[attr-defined]
    preset = load_run_config(tmp_path / "recipe.yaml", ["model.preset=tiny-10m"])
    assert preset.build_model_config().vocab_size == 4096
    assert load_run_config(tmp_path / "recipe.yaml", ["model.vocab_size=64"]).build_model_config().vocab_size == 64


def test_without_a_vocabulary_size_a_missing_tokenizer_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"model": {}}))
    assert error_message(path).startswith("t: no such tokenizer folder; ")


@pytest.mark.parametrize(
    ("tokens", "steps"),
    # Each step has 4 sequences of 32 tokens.
    [("128", 1), ("129", 2), ("12.8e3", 100), ("3e6", 23438)],
)
def test_a_length_in_tokens_is_rounded_up_to_full_steps(recipe: Path, tokens: str, steps: int) -> None:
    overrides = ["train.steps=null", f"train.tokens={tokens}", "train.global_batch_size=4"]
    train = load_run_config(recipe, overrides).train
    assert (train.steps, train.tokens) == (steps, float(tokens))
    assert load_run_config(recipe, [*overrides, f"train.steps={steps}"]).train == train, (
        "a resolved recipe has both settings"
    )


def test_a_length_in_steps_also_sets_the_length_in_tokens(recipe: Path) -> None:
    assert load_run_config(recipe, ["train.global_batch_size=4"]).train.tokens == 10 * 4 * 32


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_printed_recipe_is_the_resolved_recipe(path: Path, tmp_path: Path) -> None:
    config = load_run_config(path, ["optimizer.lr=1e-5", "data.valid=[{prefix: b, name: 'yes'}]"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(config.resolved().to_yaml(), encoding="utf-8")
    again = load_run_config(printed)
    assert again == config.resolved()
    assert again.build_model_config().to_dict() == config.build_model_config().to_dict()
    assert again.model.preset is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 100])
def test_the_help_lists_every_setting_with_its_default_and_fits_the_width(width: int) -> None:
    lines = settings_help(width).splitlines()
    names = re.findall(r"^\| `([^`]+)` \|", settings_table(), re.MULTILINE)
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert listed == names
    assert all(len(line) <= width for line in lines if line.startswith("      "))
    assert '  train.precision  (bf16|fp16|fp32; default: "bf16")' in lines
    assert "  optimizer.lr  (float; required)" in lines


WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["train.py", *sys.argv[2:]]
try:
    runpy.run_path("pretrain/train.py", run_name="__main__")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["train.step=3"], 2, "error: train.step: unknown key; did you mean 'steps'?"),
        (
            ["data.sequence_length=64"],
            2,
            "error: data.sequence_length=64: is longer than model.max_position_embeddings=",
        ),
        (["train.tokens=5"], 2, "error: train.tokens=5: takes 1 steps, but train.steps is 10"),
        (["data.tokenizer=/none"], 2, "error: /none: no such tokenizer folder"),
        (["data.train=[{prefix: /none}]"], 2, "error: /none.idx: no such file"),
        (["run.dir=/dev/null/run"], 2, "error: run.dir=/dev/null/run: cannot be written (Not a directory)"),
        (["--check", "run.dir=/dev/null/run"], 0, "False"),
        (["--print-config"], 0, "False"),
        (["--help"], 0, "False"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_errors_in_settings_are_reported_without_importing_torch(
    recipe: Path, tmp_path: Path, words: list[str], code: int, expected: str
) -> None:
    write_tokenizer(tmp_path / "tokenizer", 3)
    (tmp_path / "a.idx").touch()
    (tmp_path / "a.bin").touch()
    paths = [f"data.tokenizer={tmp_path}/tokenizer", f"data.train=[{{prefix: {tmp_path}/a}}]"]
    given = [f"--config={recipe}", "--deepspeed_config=ds_configs/zero1.json", *paths, *words]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "train.py", *given],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith(expected)
    assert lines[-1] == "False", "torch was not imported"
