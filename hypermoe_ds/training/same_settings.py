"""Refuse ranks that would train with different settings or sources."""

import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.control_group import ControlGroup
from hypermoe_ds.provenance import source_digest


def check_same_settings(recipe: Mapping[str, Any], ds_json: Mapping[str, Any]) -> None:
    """Refuse ranks whose settings or sources differ: each would train in its own way (collective).

    Raises:
        UserError: the first difference of a rank from rank 0, on every rank.
    """
    own = dict(flat({**recipe, "deepspeed_config": ds_json, "sources": source_digest()}))
    (_, first), *others = ControlGroup().gather((socket.gethostname(), own))
    for rank, (host, given) in enumerate(others, start=1):
        for key in {**first, **given}:
            here, there = first.get(key, "missing"), given.get(key, "missing")
            if here != there:
                remedy = f"give all ranks the same {'sources' if key == 'sources' else 'settings'}"
                raise UserError(key, f"is {here} on rank 0 and {there} on rank {rank} ({host})", remedy)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested settings into dotted names and values as JSON."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
