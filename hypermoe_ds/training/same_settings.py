"""Check that all ranks have the same settings and source code."""

import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.control_group import ControlGroup
from hypermoe_ds.provenance import source_digest


def check_same_settings(recipe: Mapping[str, Any], ds_json: Mapping[str, Any], ranks: ControlGroup) -> None:
    """Check that all ranks have the same settings and source code (collective).

    Args:
        recipe: the resolved recipe.
        ds_json: the DeepSpeed JSON file.
        ranks: group over which the ranks exchange their settings.

    Raises:
        UserError: a rank's settings or source code differ from rank 0's. All ranks raise the same error, which names
            the first difference.
    """
    own = dict(flat({**recipe, "deepspeed_config": ds_json, "sources": source_digest()}))
    (_, first), *others = ranks.gather((socket.gethostname(), own))
    for rank, (host, settings) in enumerate(others, start=1):
        for key in {**first, **settings}:
            expected, found = first.get(key, "missing"), settings.get(key, "missing")
            if expected != found:
                remedy = f"give all ranks the same {'sources' if key == 'sources' else 'settings'}"
                raise UserError(key, f"is {expected} on rank 0 and {found} on rank {rank} ({host})", remedy)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested settings into pairs of a dotted name and a JSON value."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
