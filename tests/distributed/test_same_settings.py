"""Ranks train together only if they have the same settings and source code."""

import socket
from typing import Any

import pytest
import torch

from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.control_group import ControlGroup
from hypermoe_ds.training import same_settings
from tests.helpers.ranks import run_on_ranks

RANKS = 3
RECIPE = {"run": {"dir": "runs/a"}, "train": {"steps": 400}, "data": {"train": [{"prefix": "a"}]}}
DS_JSON = {"zero_optimization": {"stage": 1}}
HOST = socket.gethostname()


def compare(others: list[tuple[dict[str, Any], dict[str, Any]]], digest: str | None = None) -> str | None:
    """Check settings that can differ by rank, with RECIPE and DS_JSON on rank 0, and return this rank's error."""
    rank = torch.distributed.get_rank()
    if rank == 2 and digest is not None:
        same_settings.source_digest = lambda: digest  # type: ignore[attr-defined, assignment]
    try:
        same_settings.check_same_settings(*[(RECIPE, DS_JSON), *others][rank], ControlGroup())
    except UserError as error:
        return str(error)
    return None


def with_value(section: str, key: str, value: object) -> dict[str, Any]:
    return RECIPE | {section: {key: value}}


@pytest.mark.parametrize(
    ("recipe", "ds_json", "message"),
    [
        (RECIPE, DS_JSON, None),
        (with_value("train", "steps", 40), DS_JSON, "train.steps: is 400 on rank 0 and 40 on rank 2"),
        (with_value("run", "dir", "runs/b"), DS_JSON, 'run.dir: is "runs/a" on rank 0 and "runs/b" on rank 2'),
        (with_value("data", "train", []), DS_JSON, 'data.train: is [{"prefix": "a"}] on rank 0 and [] on rank 2'),
        (
            RECIPE,
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            "deepspeed_config.zero_optimization.round_robin_gradients: is missing on rank 0 and true on rank 2",
        ),
    ],
)
def test_different_settings_on_one_rank_are_refused_on_all_ranks(
    recipe: dict[str, Any], ds_json: dict[str, Any], message: str | None
) -> None:
    expected = None if message is None else f"{message} ({HOST}); give all ranks the same settings"
    assert run_on_ranks(RANKS, compare, [(RECIPE, DS_JSON), (recipe, ds_json)]) == [expected] * RANKS


def test_different_source_code_is_refused_on_all_ranks() -> None:
    [error] = set(run_on_ranks(RANKS, compare, [(RECIPE, DS_JSON)] * 2, "0badcafe"))
    line = str(error)
    assert line.startswith("sources: is ")
    assert line.endswith(f'and "0badcafe" on rank 2 ({HOST}); give all ranks the same sources')
