"""Test the report of settings that changed since the last launch."""

from pathlib import Path
from typing import Any

import pytest

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.run_config import RunConfig
from hypermoe_ds.training.changes import record_launch, setting_changes

RECIPE: dict[str, Any] = {
    "run": {"dir": "x"},
    "model": {"vocab_size": 64},
    "data": {"train": [{"prefix": "a"}], "sequence_length": 32, "tokenizer": "t"},
    "train": {"steps": 100, "micro_batch_size": 2, "global_batch_size": 8},
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_steps": 10, "min_lr_ratio": 0.1},
}
ZERO_1 = {"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def as_run(**changes: dict[str, Any]) -> dict[str, Any]:
    recipe = {key: value | changes.get(key, {}) for key, value in RECIPE.items()}
    return RunConfig.model_validate(recipe).model_dump(mode="json")


@pytest.mark.parametrize(
    ("section", "key", "value", "shown"),
    [
        ("train", "precision", "fp32", 'train.precision "bf16" -> "fp32": training continues from the fp32'),
        ("train", "global_batch_size", 4, "train.global_batch_size 8 -> 4: steps use the new batch size"),
        ("train", "micro_batch_size", 1, "train.micro_batch_size 2 -> 1: memory and speed change"),
        ("train", "max_bad_steps", 3, "train.max_bad_steps 20 -> 3: results stay the same"),
        ("optimizer", "beta1", 0.8, "optimizer.beta1 0.9 -> 0.8: takes effect in the next step; the moments are kept"),
        ("data", "tokenizer", "t" * 200, f'data.tokenizer "t" -> "{"t" * 76}...: the run keeps the tokenizer'),
        ("data", "document_mask", True, "data.document_mask false -> true: attention and the predicted tokens change"),
    ],
)
def test_changed_setting_is_reported_with_its_effect(section: str, key: str, value: object, shown: str) -> None:
    [line] = setting_changes(as_run(), as_run(**{section: {key: value}}), ZERO_1, ZERO_1, 50)
    assert line.startswith(f"changed since the last launch: {shown}")


def test_every_setting_has_an_effect() -> None:
    for line in setting_changes({}, as_run(), {}, ZERO_1, 50):
        assert not line.endswith(": takes effect from now on"), line


def test_unchanged_settings_print_nothing() -> None:
    assert setting_changes(as_run(), as_run(), ZERO_1, ZERO_1, 50) == []
    upgraded = {**as_run(), "monitor": {**as_run()["monitor"], "newer": None}}
    assert setting_changes(as_run(), upgraded, ZERO_1, ZERO_1, 50) == []


def test_settings_missing_in_an_older_launch_are_not_a_change() -> None:
    old = as_run()
    del old["data"]["train"][0]["name"], old["train"]["tokens"]
    assert setting_changes(old, as_run(), ZERO_1, ZERO_1, 50) == []
    [line] = setting_changes(old, as_run(data={"train": [{"prefix": "a", "name": "web"}]}), ZERO_1, ZERO_1, 50)
    assert line.startswith("changed since the last launch: data.train [")


def test_same_length_in_tokens_is_not_a_change() -> None:
    in_tokens = as_run(train={"steps": None, "tokens": 100 * 8 * 32})
    assert setting_changes(as_run(), in_tokens, ZERO_1, ZERO_1, 50) == []
    longer = as_run(train={"steps": None, "tokens": 200 * 8 * 32})
    lines = setting_changes(in_tokens, longer, ZERO_1, ZERO_1, 50)
    assert [line for line in lines if "tokens" in line] == []
    assert lines[0].startswith("changed since the last launch: train.steps 100 -> 200: ")


def test_only_deepspeed_keys_outside_the_recipe_are_compared() -> None:
    zero_3 = {"train_batch_size": 4, "zero_optimization": {"stage": 3, "leaf_module": {"classes": ["HyperNetwork"]}}}
    [line] = setting_changes(as_run(), as_run(), ZERO_1, zero_3, 50)
    assert line.startswith("changed since the last launch: deepspeed.zero_optimization.stage 1 -> 3: memory and speed")


def test_changed_learning_rate_is_reported_for_the_next_step() -> None:
    change, rate = setting_changes(as_run(), as_run(optimizer={"lr": 1e-4}), ZERO_1, ZERO_1, 54)
    assert change.startswith("changed since the last launch: optimizer.lr 0.001 -> 0.0001: the schedule continues")
    # Halfway through the 90 steps after the warm-up, the rate is (1 + 0.1) / 2 times the peak.
    assert rate == "learning rate of step 55: 5.500e-05 instead of 5.500e-04; step 54 had 5.657e-04"


@pytest.mark.parametrize("changes", [{"train": {"steps": 1000}}, {"optimizer": {"lr": 1.0}}])
def test_learning_rate_that_rises_again_is_warned_about(changes: dict[str, Any]) -> None:
    *_, rate = setting_changes(as_run(), as_run(**changes), ZERO_1, ZERO_1, 100)
    assert rate.startswith("warning: the learning rate rises again after it had fallen, which can raise the loss; ")
    assert rate.endswith("step 100 had 1.000e-04")


def test_longer_stable_phase_is_not_a_rise() -> None:
    stable = {"name": "warmup_stable_decay", "decay_steps": 10}
    old, new = as_run(schedule=stable), as_run(schedule=stable, train={"steps": 200})
    assert [line for line in setting_changes(old, new, ZERO_1, ZERO_1, 90) if "warning" in line] == []
    assert [line for line in setting_changes(old, new, ZERO_1, ZERO_1, 95) if "warning" in line] != []


def test_resume_prints_changes_and_saves_the_new_settings(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.model").write_bytes(b"pieces")
    run, lines, data = RunFolder(tmp_path / "run"), list[str](), {"tokenizer": str(tmp_path / "t")}
    for step, seed in ((0, 1), (0, 2), (5, 3), (6, 3)):
        settings = as_run(data=data, train={"seed": seed})
        record_launch(run, settings, ZERO_1, HyperMoEConfig(vocab_size=64), step, lines.append)
        assert run.read_settings() == settings
    assert [line.partition(":")[2].partition(":")[0] for line in lines] == [" train.seed 2 -> 3"]


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[1]", b"[" * 100_000, b'"x"'])
@pytest.mark.parametrize("name", ["config.yaml", "deepspeed.json"])
def test_damaged_settings_of_the_last_launch_are_reported_and_replaced(
    tmp_path: Path, name: str, damage: bytes
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.model").touch()
    run, lines, settings = RunFolder(tmp_path / "run"), list[str](), as_run(data={"tokenizer": str(tmp_path / "t")})
    for step in (0, 5, 6):
        record_launch(run, settings, ZERO_1, HyperMoEConfig(vocab_size=64), step, lines.append)
        if step == 0:
            (run.settings.parent / name).write_bytes(damage)
    [line] = lines
    assert line.endswith(" is damaged: changes since the last launch are unknown; both files are replaced")
