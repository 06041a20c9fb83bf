"""Print what a run does, for the person who watches it."""

import logging
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock, Timer
from typing import TYPE_CHECKING, TextIO

import rich.console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from hypermoe_ds.monitor.folding import LayerMessages
from hypermoe_ds.monitor.units import duration, readable

if TYPE_CHECKING:
    from torch import Tensor

_OURS = Path(__file__).parents[1]
_COLUMNS = 120  # of text that goes to a file
_LONG_SECONDS = 30  # after which long work gets a line of its own if no status line shows it
_PARTS_OF_A_STEP = ("beginning", "forward and backward")
_WARNING = "warning: "


class Console:
    """Print lines on rank 0, and on a terminal keep a status line below them.

    As a context manager it also prints messages and warnings of this package, and keeps the status line; nothing of it
    waits for a device.

    Args:
        rank: this rank.
        out: where lines are printed; None takes stdout.
    """

    def __init__(self, rank: int, out: TextIO | None = None) -> None:
        self._prints = rank == 0
        self._out = sys.stdout if out is None else out
        self._is_terminal = self._out.isatty()
        width = None if self._is_terminal else _COLUMNS
        self._rich = _Rich(file=self._out, force_terminal=self._is_terminal, width=width)
        self._lock = RLock()  # checkpoints are written, and logged, by a thread of their own
        self._layers = LayerMessages()
        self._status = _Status()
        self._printed = time.monotonic()

    def log(self, line: str) -> None:
        """Print one line; ignore a closed stdout, as after a killed launcher."""
        with self._lock:
            for message in (*self._layers.take(), line):
                self._print(Text(message, "bold yellow" if message.startswith(_WARNING) else ""))

    def table(self, rows: Sequence[tuple[str, str]], wrap: bool = True) -> None:
        """Print rows of a name and a text in two columns.

        Args:
            rows: the rows; a row without a name continues the one above it.
            wrap: break long texts; commands that are to be copied are not broken.
        """
        indent = max(len(name) for name, _ in rows) + 2
        with self._lock:
            for name, text in rows:
                lines = textwrap.wrap(text, max(self._rich.width - indent, 40)) if wrap else [text]
                for number, line in enumerate(lines):
                    self._print(Text.assemble((f"{'' if number else name:<{indent}}", "bold"), line))

    def progress(self, steps: int, step: int, doing: str, done: int = 0, total: int | None = None) -> None:
        """Show what a step of the run does; without a terminal, print a line now and then for other work than steps.

        Args:
            steps: length of the run.
            step: the step.
            doing: what is done in it.
            done: how many parts of that, such as batches of a validation, are done.
            total: how many there are, if that is known.
        """
        if not self._prints or doing == "waiting for data":  # part of whatever the data are for
            return
        is_part = doing in _PARTS_OF_A_STEP
        part = f" {done:,}/{total:,}" if total else f" {done:,}" if done else ""
        text = "training" if is_part else f"{doing}{part}"
        if self._is_terminal:
            self._status.show(steps, step, text)
        elif not is_part and done and time.monotonic() - self._printed > _LONG_SECONDS:
            self.log(f"step {step:,}: {text}")

    @contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Show what is done inside; without a terminal, print one line if it takes more than 30 s."""
        self._status.text = doing
        timer = Timer(_LONG_SECONDS, self.log, [f"{doing} ..."])
        timer.daemon = True
        if self._prints and not self._is_terminal:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._status.text = ""

    def __enter__(self) -> "Console":
        self._live = Live(
            self._status, console=self._rich, transient=True, refresh_per_second=2,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._handler = _ToConsole(self)
        self._show_warning = warnings.showwarning
        if self._prints:
            logger = logging.getLogger("hypermoe_ds")
            logger.setLevel(logging.INFO)
            logger.addHandler(self._handler)
            warnings.showwarning = self._warn
            if self._is_terminal:
                self._live.start()
                self._rich.show_cursor(True)  # a killed rank could not show it again
        return self

    def __exit__(self, *_error: object) -> None:
        if self._prints:
            self._live.stop()
            warnings.showwarning = self._show_warning
            logging.getLogger("hypermoe_ds").removeHandler(self._handler)
            for message in self._layers.take():
                self._print(Text(message))

    def message(self, record: logging.LogRecord) -> None:
        """Print a message of this package; those of several layers are collected until another line is printed."""
        line = record.getMessage()
        with self._lock:
            if record.levelno < logging.WARNING and self._layers.add(line):
                return
        marked = line.startswith((_WARNING, "error: ")) or record.levelno < logging.WARNING
        self.log(line if marked else f"{_WARNING}{line}")

    def _warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if Path(filename).is_relative_to(_OURS):
            self.log(f"{_WARNING}{message}")
        else:
            self._show_warning(message, category, filename, lineno, file, line)

    def _print(self, text: Text) -> None:
        if not self._prints:
            return
        self._printed = time.monotonic()
        try:
            self._rich.print(text, soft_wrap=True)
            self._out.flush()
        except OSError:  # the run continues, or saves and ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


class _Rich(rich.console.Console):
    """A console of rich's that does not end the process when its other end is closed."""

    def on_broken_pipe(self) -> None:
        """Raise the error on."""
        raise  # noqa: PLE0704 (called in an except block)


class _ToConsole(logging.Handler):
    """Hand messages to a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        self._console.message(record)


class _Status:
    """The status line: what is done, and in a run its step and the time left at the pace since the launch."""

    def __init__(self) -> None:
        self.text = ""
        self._steps = self._step = 0
        self._first: tuple[float, int] | None = None  # when the first step was seen, and which one it was
        self._spinner = Spinner("dots")

    def show(self, steps: int, step: int, text: str) -> None:
        """Note where the run is."""
        if self._first is None or step <= self._first[1]:  # the first step is slower than the others
            self._first = (time.monotonic(), step)
        self._steps, self._step, self.text = steps, step, text

    def __rich__(self) -> Spinner | Text:
        """Return the line as it is now; empty if nothing is done that is worth one."""
        if not self.text:
            return Text("")
        parts = [self.text]
        if self._first is not None:
            parts.insert(0, f"step {self._step:,}/{self._steps:,}  {self._step / self._steps:.0%}")
            taken = self._step - self._first[1]
            if taken > 0:
                pace = (time.monotonic() - self._first[0]) / taken
                parts.append(f"left {duration(pace * max(self._steps - self._step, 0))}")
        self._spinner.update(text=Text("  ".join(parts), "dim"))
        return self._spinner


def step_line(step: int, steps: int, scalars: Mapping[str, float], seconds_left: float, load_MN: "Tensor") -> str:
    """Return the console's line of one logged step; its columns keep their places over a run.

    Args:
        step: optimizer step, counted from 1.
        steps: length of the run.
        scalars: metrics of the step by their keys; those that are missing have no column.
        seconds_left: until the end of the run.
        load_MN: share of each MoE layer's routed rows that each expert received; without a row there is no column.
    """
    width = len(f"{steps:,}")
    parts = [time.strftime("%H:%M:%S"), f"step {step:>{width},}/{steps:,}", f"loss {scalars['loss']:7.4f}"]
    parts += _columns(_STEP_COLUMNS, scalars)
    memory = scalars.get("memory_reserved_gib", scalars.get("peak_memory_gib"))
    if memory is not None:
        parts.append(f"{memory:5.1f} GiB")
    if load_MN.numel():
        even = load_MN.shape[1]  # 1 is the even share
        parts.append(f"load {float(load_MN.min()) * even:.1f}-{float(load_MN.max()) * even:<4.1f}")
    parts.append(f"left {duration(seconds_left):>8}")
    return "  ".join(parts)


def validation_lines(step: int, steps: int, values: Mapping[str, float]) -> list[str]:
    """Return the console's lines of one validation: one for each dataset, and one for several together.

    Args:
        step: optimizer step, counted from 1.
        steps: length of the run.
        values: metrics of the validation by their keys.
    """
    names = [key.removeprefix("valid_loss/") for key in values if key.startswith("valid_loss/")]
    rows = [(name, f"/{name}") for name in names] + [("all", "")] * (len(names) != 1)
    place = f"step {step:>{len(f'{steps:,}')},}/{steps:,}"
    column = max(len(name) for name, _ in rows)
    now = time.strftime("%H:%M:%S")
    return [
        "  ".join([now, place, f"valid {name:<{column}}", *_columns(_VALIDATION_COLUMNS, values, item)])
        for name, item in rows
    ]


Columns = Sequence[tuple[str, Callable[[float], str]]]


def _columns(columns: Columns, values: Mapping[str, float], item: str = "") -> list[str]:
    """Return the text of each metric that there is a value of."""
    return [show(values[f"{metric}{item}"]) for metric, show in columns if f"{metric}{item}" in values]


def _fixed(value: float) -> str:
    """Return a number of any size in at most 8 characters."""
    return f"{value:.3f}" if not math.isfinite(value) or value < 1000 else f"{value:.2e}"


_STEP_COLUMNS: Columns = (
    ("lr", "lr {:.2e}".format),
    ("grad_norm", lambda norm: f"grad {_fixed(norm):>8}"),
    ("consumed_tokens", lambda tokens: f"tokens {readable(tokens):>6}"),
    ("tokens_per_second", "{:>9,.0f} tok/s".format),
    ("mfu", "MFU {:>4.0%}".format),
)
_VALIDATION_COLUMNS: Columns = (
    ("valid_loss", "loss {:7.4f}".format),
    ("valid_perplexity", lambda perplexity: f"perplexity {_fixed(perplexity):>8}"),
    ("valid_bits_per_byte", "{:6.4f} bits/byte".format),
    ("hyper_expert_contribution", "HyperExperts contribute {:+.4f}".format),
)
