"""Show the progress of long operations: a bar on a terminal, otherwise a line every 30 s."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30
Item = TypeVar("Item")


class Progress:
    """Context manager that shows progress on stderr.

    Args:
        doing: name of the operation.
        unit: name of the counted items, in the plural.
        total: number of items; None if unknown.
        note: function that returns a note to show with the progress, such as a speed.
    """

    def __init__(self, doing: str, unit: str, total: int | None = None, note: Callable[[], str] | None = None) -> None:
        self._doing, self._unit, self._total = doing, unit, total
        self._note = note or (lambda: "")
        self._done = 0
        self._printed = time.monotonic()
        self._bar = tqdm(total=total, desc=doing, unit=f" {unit}", unit_scale=True, leave=False, disable=None)

    def update(self, count: int = 1) -> None:
        """Advance the progress by `count` items."""
        self._done += count
        if self._bar.update(count):
            self._bar.set_postfix_str(self._note(), refresh=False)
        if self._bar.disable and time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            of_all = f" of {self._total:,}" if self._total else ""
            remark = f", {note}" if (note := self._note()) else ""
            print(f"{self._doing}: {self._done:,}{of_all} {self._unit}{remark}", file=sys.stderr, flush=True)

    def print(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(line, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def progress(items: Iterable[Item], doing: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show the progress of the iteration."""
    with Progress(doing, unit, total) as bar:
        for item in items:
            yield item
            bar.update()
