"""Test the settings of text generation."""

import pytest

from hypermoe_ds.config import validate
from hypermoe_ds.errors import UserError
from hypermoe_ds.export.generation import SamplingConfig

GOOD = {"prompt": "def", "max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ""),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 3.0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_invalid_sampling_settings_are_refused_by_name(name: str, value: object) -> None:
    validate(SamplingConfig, GOOD, "arguments")
    with pytest.raises(UserError, match=f"arguments: {name}={value!r}"):
        validate(SamplingConfig, GOOD | {name: value}, "arguments")
