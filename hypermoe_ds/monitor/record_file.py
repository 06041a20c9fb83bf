"""Write RUN_DIR/metrics.jsonl and RUN_DIR/samples.jsonl: one JSON object per line, each with a step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypermoe_ds.files import write_lines
from hypermoe_ds.monitor.summary import iterate_records


class RecordFile:
    """Append records, and drop those of steps that a resumed run repeats.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def drop_after(self, step: int) -> None:
        """Remove the records of all steps after `step`."""
        if not self.path.exists():
            return
        kept = (record for record in iterate_records(self.path) if record["step"] <= step)
        write_lines(self.path, (f"{json.dumps(record)}\n" for record in kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record and flush it; NaN and infinity, which JSON cannot represent, become null."""
        finite = {key: None if _is_not_finite(value) else value for key, value in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
