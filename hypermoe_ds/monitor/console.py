"""Print the progress of a run on the console."""

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

_PACKAGE = Path(__file__).parents[1]
_COLUMNS = 120  # width of output to a file
_LONG_SECONDS = 30  # without a status line, operations that take longer are logged
_TRAINING = ("beginning", "forward and backward")
_WARNING = "warning: "


class Console:
    """Print lines on rank 0 and, on a terminal, a status line below them.

    When used as a context manager, the console also prints the log messages and warnings of this package. The console
    never waits for a device.

    Args:
        rank: this rank.
        out: output stream; None selects stdout.
    """

    def __init__(self, rank: int, out: TextIO | None = None) -> None:
        self._prints = rank == 0
        self._out = sys.stdout if out is None else out
        self._is_terminal = self._out.isatty()
        width = None if self._is_terminal else _COLUMNS
        self._rich = _Rich(file=self._out, force_terminal=self._is_terminal, width=width)
        self._lock = RLock()  # the background thread that writes checkpoints also logs
        self._layers = LayerMessages()
        self._status = _Status()
        self._printed = time.monotonic()

    def log(self, line: str) -> None:
        """Print one line. Ignore the error if a killed launcher has closed stdout."""
        with self._lock:
            for message in (*self._layers.take(), line):
                self._print(Text(message, "bold yellow" if message.startswith(_WARNING) else ""))

    def table(self, rows: Sequence[tuple[str, str]], wrap: bool = True) -> None:
        """Print rows of a name and a text in two columns.

        Args:
            rows: the rows; a row without a name continues the row above it.
            wrap: whether to wrap long texts; false for commands that users copy.
        """
        indent = max(len(name) for name, _ in rows) + 2
        with self._lock:
            for name, text in rows:
                lines = textwrap.wrap(text, max(self._rich.width - indent, 40)) if wrap else [text]
                for number, line in enumerate(lines):
                    self._print(Text.assemble((f"{'' if number else name:<{indent}}", "bold"), line))

    def progress(self, steps: int, step: int, doing: str, done: int = 0, total: int | None = None) -> None:
        """Show the current part of a step; without a terminal, log long operations other than training every 30 s.

        Args:
            steps: length of the run.
            step: the step.
            doing: the part of the step.
            done: items of the part that are done, such as validation batches.
            total: number of items; None if unknown.
        """
        if not self._prints or doing == "waiting for data":  # both training and validation wait for data
            return
        is_training = doing in _TRAINING
        count = f" {done:,}/{total:,}" if total else f" {done:,}" if done else ""
        text = "training" if is_training else f"{doing}{count}"
        if self._is_terminal:
            self._status.show(steps, step, text)
        elif not is_training and done and time.monotonic() - self._printed > _LONG_SECONDS:
            self.log(f"step {step:,}: {text}")

    @contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Show `doing` while the code inside the context runs; without a terminal, print a line after 30 s."""
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
                self._rich.show_cursor(True)  # rich hides the cursor, and a killed rank could not restore it
        return self

    def __exit__(self, *_error: object) -> None:
        if self._prints:
            self._live.stop()
            warnings.showwarning = self._show_warning
            logging.getLogger("hypermoe_ds").removeHandler(self._handler)
            for message in self._layers.take():
                self._print(Text(message))

    def message(self, record: logging.LogRecord) -> None:
        """Print a log message of this package; collect messages about layers until another line is printed."""
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
        if Path(filename).is_relative_to(_PACKAGE):
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
        except OSError:  # a closed stdout must not end the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


class _Rich(rich.console.Console):
    """A rich console that does not exit the process when the output is closed."""

    def on_broken_pipe(self) -> None:
        """Re-raise the error."""
        raise  # noqa: PLE0704 (called in an except block)


class _ToConsole(logging.Handler):
    """Forward log messages to a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        self._console.message(record)


class _Status:
    """Status line: the current operation and, during training, the step and the time left at the average pace."""

    def __init__(self) -> None:
        self.text = ""
        self._steps = self._step = 0
        self._first: tuple[float, int] | None = None  # time and number of the first step
        self._spinner = Spinner("dots")

    def show(self, steps: int, step: int, text: str) -> None:
        """Set the step and the text of the status line."""
        if self._first is None or step <= self._first[1]:  # exclude the first step, because it is slow
            self._first = (time.monotonic(), step)
        self._steps, self._step, self.text = steps, step, text

    def __rich__(self) -> Spinner | Text:
        """Return the text of the status line; empty if no work is in progress."""
        if not self.text:
            return Text("")
        parts = [self.text]
        if self._first is not None:
            parts.insert(0, f"step {self._step:,}/{self._steps:,}  {self._step / self._steps:.0%}")
            steps = self._step - self._first[1]
            if steps > 0:
                pace = (time.monotonic() - self._first[0]) / steps
                parts.append(f"left {duration(pace * max(self._steps - self._step, 0))}")
        self._spinner.update(text=Text("  ".join(parts), "dim"))
        return self._spinner


def step_line(step: int, steps: int, scalars: Mapping[str, float], seconds_left: float, load_MN: "Tensor") -> str:
    """Format the line of a logged step, with the same columns in every step.

    Args:
        step: optimizer step, counted from 1.
        steps: length of the run.
        scalars: metrics of the step by key; missing metrics have no column.
        seconds_left: time until the end of the run.
        load_MN: share of each MoE layer's routed rows that each expert received; empty for a dense model.
    """
    width = len(f"{steps:,}")
    parts = [time.strftime("%H:%M:%S"), f"step {step:>{width},}/{steps:,}", f"loss {scalars['loss']:7.4f}"]
    parts += _columns(_STEP_COLUMNS, scalars)
    memory = scalars.get("memory_reserved_gib", scalars.get("peak_memory_gib"))
    if memory is not None:
        parts.append(f"{memory:5.1f} GiB")
    if load_MN.numel():
        experts = load_MN.shape[1]  # scale the loads so that an even load is 1
        parts.append(f"load {float(load_MN.min()) * experts:.1f}-{float(load_MN.max()) * experts:<4.1f}")
    parts.append(f"left {duration(seconds_left):>8}")
    return "  ".join(parts)


def validation_lines(step: int, steps: int, values: Mapping[str, float]) -> list[str]:
    """Format the lines of a validation: one per dataset and, if there are several datasets, one for all of them.

    Args:
        step: optimizer step, counted from 1.
        steps: length of the run.
        values: metrics of the validation by key.
    """
    names = [key.removeprefix("valid_loss/") for key in values if key.startswith("valid_loss/")]
    rows = [(name, f"/{name}") for name in names] + [("all", "")] * (len(names) != 1)
    position = f"step {step:>{len(f'{steps:,}')},}/{steps:,}"
    column = max(len(name) for name, _ in rows)
    now = time.strftime("%H:%M:%S")
    return [
        "  ".join([now, position, f"valid {name:<{column}}", *_columns(_VALIDATION_COLUMNS, values, item)])
        for name, item in rows
    ]


Columns = Sequence[tuple[str, Callable[[float], str]]]


def _columns(columns: Columns, values: Mapping[str, float], item: str = "") -> list[str]:
    """Format the metrics that have a value."""
    return [show(values[f"{metric}{item}"]) for metric, show in columns if f"{metric}{item}" in values]


def _fixed(value: float) -> str:
    """Format a number of any size in at most 8 characters."""
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
