"""Write RUN_DIR/csv: a table of training metrics and a table of validation metrics, with one row per record."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hypermoe_ds.files import write_atomically


class CsvTable:
    """A CSV file with the columns `step`, `time` and one per metric; missing metrics are empty cells.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []

    def drop_after(self, step: int) -> None:
        """Remove rows of steps that a resumed run repeats, and damaged or truncated rows."""
        if not self._path.exists():
            return
        first, *lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if not first.startswith("step,time"):
            self._path.unlink()
            return
        [self._columns] = csv.reader([first])
        # A CSV reader would fail on damaged files with undecodable bytes or fields of several megabytes.
        rows = (line.split(",") for line in lines)
        columns = len(self._columns)
        self._rewrite(row for row in rows if len(row) == columns and row[0].isdecimal() and int(row[0]) <= step)

    def append(self, record: Mapping[str, float]) -> None:
        """Append a row. If the record has new metrics, first rewrite the file atomically with the new columns."""
        missing = [key for key in record if key not in self._columns]
        if missing:
            rows = self._rows() if self._columns else []
            self._columns = [*self._columns, *missing]
            self._rewrite([*row, *[""] * (len(self._columns) - len(row))] for row in rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([record.get(column, "") for column in self._columns])

    def _rows(self) -> list[list[str]]:
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))[1:]

    def _rewrite(self, rows: Iterable[Sequence[str]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([self._columns, *rows])
        write_atomically(self._path, text.getvalue())
