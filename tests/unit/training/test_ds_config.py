"""Test the DeepSpeed configuration: each setting has one owner, and unknown settings are refused."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.training.ds_config import _KNOWN, _OWNED_BY_RECIPE, load_deepspeed_json, merge, zero_stage
from hypermoe_ds.training.settings import TrainConfig

DS_CONFIGS = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
MODEL = HyperMoEConfig(num_experts=4, num_experts_per_tok=2)
DENSE = HyperMoEConfig(num_hidden_layers=2, first_dense_layers=2)
EXAMPLES: dict[type, Any] = {int: 5, float: 0.5, str: "text", bool: True, list: ["all"]}


def train(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "micro_batch_size": 2, "global_batch_size": 16, **changes})


def read(tmp_path: Path, content: object) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_deepspeed_json(path)


def refusal(tmp_path: Path, content: object) -> str:
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    return str(error.value).removeprefix(f"{tmp_path}/ds.json")


def leaves(known: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    for key, kind in known.items():
        if isinstance(kind, Mapping):
            yield from leaves(kind, (*path, key))
        else:
            yield (*path, key), kind


def nested(path: tuple[str, ...], value: object) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


LEAVES = dict(leaves(_KNOWN))


# Reading


@pytest.mark.parametrize("key", _OWNED_BY_RECIPE)
def test_keys_that_the_recipe_owns_are_refused_with_the_setting_to_use(key: str, tmp_path: Path) -> None:
    owner = _OWNED_BY_RECIPE[key]
    text = refusal(tmp_path, {"zero_optimization": {"stage": 1}, key: 1})
    assert text == f": {key}: belongs to the recipe; remove it and set {owner}"


def test_owners_of_keys_are_settings_of_a_recipe() -> None:
    from hypermoe_ds.run_config import RunConfig  # noqa: PLC0415

    for owner in _OWNED_BY_RECIPE.values():
        section, _, name = owner.partition(".")
        assert section in RunConfig.model_fields
        if name:
            assert name in RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_unknown_keys_are_refused_with_the_closest_known_key(path: tuple[str, ...], tmp_path: Path) -> None:
    *parents, key = path
    misspelt = f"{key[:-1]}x"
    expected = f": {'.'.join((*parents, misspelt))}: unknown key; did you mean '{key}'?"
    assert refusal(tmp_path, nested((*parents, misspelt), EXAMPLES[LEAVES[path]])) == expected


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_values_of_the_wrong_type_are_refused(path: tuple[str, ...], tmp_path: Path) -> None:
    kind = LEAVES[path]
    assert read(tmp_path, nested(path, EXAMPLES[kind])) == nested(path, EXAMPLES[kind])
    for other, value in EXAMPLES.items():
        if other is kind or (kind is float and other is int):
            continue
        text = refusal(tmp_path, nested(path, value))
        assert (
            text
            == f": {'.'.join(path)}={value!r}: is not of type {kind.__name__}; give a value of type {kind.__name__}"
        )
    assert "is no" in refusal(tmp_path, nested(path, None))
    assert "is no" in refusal(tmp_path, nested(path, {"enabled": True}))


@pytest.mark.parametrize("path", [path for path, kind in LEAVES.items() if kind in (int, float)], ids=".".join)
def test_numbers_out_of_range_are_refused(path: tuple[str, ...], tmp_path: Path) -> None:
    values: list[float] = [-2, 10**30, *([1.5] if path[-1] == "ratio" else [])]
    if LEAVES[path] is float:
        values += [math.nan, math.inf]
    for value in values:
        assert f"{path[-1]}={value!r}: is out of range; give " in refusal(tmp_path, nested(path, value))


def test_value_instead_of_a_section_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, {"zero_optimization": 2}).startswith(
        ": zero_optimization=2: is not an object; give one of "
    )


def test_integers_may_have_an_exponent(tmp_path: Path) -> None:
    assert read(tmp_path, '{"zero_optimization": {"reduce_bucket_size": 5e8}}') == {
        "zero_optimization": {"reduce_bucket_size": 5e8}
    }
    assert "is not of type int" in refusal(tmp_path, '{"zero_optimization": {"reduce_bucket_size": 5.5}}')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"zero_optimization": {"stage": 1, "stage": 3}}', "key 'stage' is given twice"),
        ("[1]", "is not a JSON object"),
        ('"a"', "is not a JSON object"),
    ],
)
def test_invalid_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text)
    assert "ds_configs/zero1.json" in refusal(tmp_path, text)


@pytest.mark.parametrize("depth", [900, 990, 200_000])
def test_deep_nesting_is_refused(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text('{"communication_data_type": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(
        UserError, match=r"is nested too deeply; start from|is not of type str; give a value of type str"
    ):
        load_deepspeed_json(path)


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            load_deepspeed_json(path)
    (tmp_path / "latin.json").write_bytes(b'"caf\xe9"')
    with pytest.raises(UserError, match="is not JSON"):
        load_deepspeed_json(tmp_path / "latin.json")


def names(model: Any) -> set[str]:
    fields = model.model_fields
    return set(fields) | {field.alias for field in fields.values() if field.alias}


def test_known_zero_keys_exist_in_deepspeed() -> None:
    known = _KNOWN["zero_optimization"]
    assert set(known) <= names(DeepSpeedZeroConfig)
    assert set(known["offload_optimizer"]) <= names(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(known["offload_param"]) <= names(DeepSpeedZeroOffloadParamConfig)


# Merging


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_accepts_every_merged_file_of_the_repository(path: Path, precision: str) -> None:
    content = load_deepspeed_json(path)
    merged = merge(content, train(precision=precision, clip_grad_norm=0.7), MODEL, 1, world_size=1)
    config = DeepSpeedConfig(json.loads(json.dumps(merged)))
    assert config.zero_optimization_stage == zero_stage(content) == int(path.stem[4])
    assert config.train_batch_size == 16
    assert config.train_micro_batch_size_per_gpu == 2
    assert config.gradient_accumulation_steps == 8
    assert config.gradient_clipping == 0.7
    assert config.bfloat16_config.enabled == (precision == "bf16")
    assert config.float16_config.enabled == (precision == "fp16")
    offload = config.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == ("offload" in path.name)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1.0])
def test_gradient_clipping_is_always_set(clip: float) -> None:
    assert (
        merge({"zero_optimization": {"stage": 1}}, train(clip_grad_norm=clip), MODEL, 1, world_size=1)[
            "gradient_clipping"
        ]
        == clip
    )


def test_merge_adds_the_settings_of_the_recipe_and_keeps_the_json() -> None:
    content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    before = json.dumps(content)
    merged = merge(content, train(), MODEL, 2, world_size=4)
    assert json.dumps(content) == before
    assert {key: merged[key] for key in content} == content
    added = merged.keys() - content.keys()
    assert added <= _OWNED_BY_RECIPE.keys() | {"data_types"}
    assert merged["train_batch_size"] == 16
    assert merged["train_micro_batch_size_per_gpu"] * merged["gradient_accumulation_steps"] * 4 == 16
    assert merged["expert_parallel"]["autoep_size"] == 2
    assert merged["steps_per_print"] > 10**9


def test_zero_3_gathers_the_whole_hypernetwork() -> None:
    from hypermoe_ds.modeling import hyper_experts  # noqa: PLC0415

    content = {"zero_optimization": {"stage": 3, "sub_group_size": 7}}
    merged = merge(content, train(), MODEL, 2, world_size=4)
    leaf_module = merged["zero_optimization"].pop("leaf_module")
    assert merged["zero_optimization"] == content["zero_optimization"]
    for name in leaf_module["classes"]:
        assert hasattr(hyper_experts, name)
    for stage in (1, 2):
        merged = merge({"zero_optimization": {"stage": stage}}, train(), MODEL, 2, world_size=4)
        assert merged["zero_optimization"] == {"stage": stage}


def test_dense_model_has_no_expert_parallelism() -> None:
    merged = merge({"zero_optimization": {"stage": 1}}, train(), DENSE, 1, world_size=4)
    assert "expert_parallel" not in merged


@pytest.mark.parametrize(
    "content", [{}, {"zero_optimization": {}}, *({"zero_optimization": {"stage": n}} for n in (-1, 0, 4))]
)
def test_a_stage_other_than_1_2_and_3_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^zero_optimization.stage=(-1|0|4): is not supported; set it to 1, 2 or 3$"):
        merge(content, train(), MODEL, 1, world_size=1)


@pytest.mark.parametrize(
    ("zero", "others", "message"),
    [
        ({"offload_optimizer": {"device": "cuda:7"}}, {}, "zero_optimization.offload_optimizer.device=cuda:7: is unk"),
        ({"offload_optimizer": {"device": "nvme"}}, {}, "offload_optimizer.device=nvme: is not supported"),
        ({"offload_param": {"device": "cpu"}}, {}, "offload_param.device=cpu: has no effect under stage 2; use stage"),
        ({"allgather_bucket_size": 3}, {}, "zero_optimization.allgather_bucket_size=3: is odd"),
        (
            {"reduce_scatter": False},
            {},
            "reduce_scatter=false: is not supported with a Mixture of Experts under stage 2",
        ),
        ({}, {"gradient_predivide_factor": 4.0}, "is not supported with zero_optimization.reduce_scatter"),
        ({"stage": 3}, {"prescale_gradients": True}, "is not supported with zero_optimization.reduce_scatter"),
    ],
)
def test_settings_that_deepspeed_ignores_or_fails_on_are_refused(
    zero: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        merge({"zero_optimization": {"stage": 2, **zero}, **others}, train(), MODEL, 1, world_size=1)


@pytest.mark.parametrize(
    ("precision", "micro_batch", "given", "expected"),
    [
        ("bf16", 2, {}, "fp32"),
        ("bf16", 4, {}, None),  # one micro-batch per step
        ("bf16", 2, {"grad_accum_dtype": "bf16"}, "bf16"),
        ("bf16", 4, {"grad_accum_dtype": "fp32"}, "fp32"),
        ("fp32", 2, {}, None),
        ("fp16", 2, {}, None),
    ],
)
def test_bf16_gradients_accumulate_in_fp32_by_default(
    precision: str, micro_batch: int, given: dict[str, str], expected: str | None
) -> None:
    content = {"zero_optimization": {"stage": 1}, **({"data_types": given} if given else {})}
    settings = train(precision=precision, micro_batch_size=micro_batch, global_batch_size=16)
    merged = merge(content, settings, MODEL, 1, world_size=4)
    assert merged.get("data_types", {}).get("grad_accum_dtype") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"data_types": {"grad_accum_dtype": "fp16"}},
            "data_types.grad_accum_dtype=fp16: does not fit train.precision=",
        ),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "set it to fp32 or bf16"),
        ({"communication_data_type": "int8"}, "communication_data_type=int8: is unknown; set it to fp32, bf16 or fp16"),
    ],
)
def test_data_types_that_deepspeed_lacks_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        merge({"zero_optimization": {"stage": 1}, **content}, train(precision="bf16"), MODEL, 1, world_size=1)
