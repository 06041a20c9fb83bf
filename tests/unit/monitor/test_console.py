"""Test the console output of a run."""

import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import hypermoe_ds
from hypermoe_ds.monitor.console import Console, step_line
from hypermoe_ds.monitor.folding import LayerMessages
from hypermoe_ds.monitor.units import counted, duration, readable

SCALARS = {"loss": 2.34567, "lr": 1.5e-4, "grad_norm": 0.98765, "tokens_per_second": 12345.6}
NO_LOAD = torch.empty(0, 2)


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def visible(text: str) -> str:
    """Remove the escape sequences for cursor and colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_only_rank_zero_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        with Console(rank) as console:
            console.log("a line [of] text")
            console.table([("name", "text")])
    assert capsys.readouterr().out == "a line [of] text\nname  text\n"


def test_step_line_shows_step_metrics_and_time_left() -> None:
    load_MN = torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    time, line = step_line(5, 100, SCALARS, 3725.4, load_MN).split("  ", maxsplit=1)
    assert re.fullmatch(r"\d\d:\d\d:\d\d", time)
    assert (
        line == "step   5/100  loss  2.3457  lr 1.50e-04  grad    0.988     12,346 tok/s  load 0.2-1.8   left  1:02:05"
    )
    assert step_line(100, 100, SCALARS, 0, NO_LOAD).endswith(" tok/s  left  0:00:00")


def test_step_lines_of_a_run_have_aligned_columns() -> None:
    small = {**SCALARS, "consumed_tokens": 900, "mfu": 0.05, "memory_reserved_gib": 3.2}
    large = {
        "loss": float("nan"), "lr": 0.0, "grad_norm": 12345.6, "tokens_per_second": 9_999_999, "consumed_tokens": 3e11,
        "mfu": 1.0, "memory_reserved_gib": 139.75,
    }  # fmt: skip
    even, uneven = torch.full((1, 64), 1 / 64), torch.eye(64)[:1]
    lines = [step_line(1, 20000, small, 59, even), step_line(20000, 20000, large, 359999, uneven)]
    names = ("step", "loss", "lr", "grad", "tokens", " tok/s", "MFU", "GiB", "load", "left")
    assert [lines[0].index(name) for name in names] == [lines[1].index(name) for name in names]
    assert len(lines[0]) == len(lines[1])


def test_closed_stdout_does_not_end_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed, Console(0, closed) as console:
        for _ in range(3):
            console.log("step 1")


def test_warnings_are_highlighted_only_on_a_terminal() -> None:
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        Console(0, out).log("warning: beware")
    assert file.getvalue() == "warning: beware\n"
    assert terminal.getvalue() == "\x1b[1;33mwarning: beware\x1b[0m\n"


def test_only_a_terminal_shows_a_status_line() -> None:
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        with Console(0, out) as console, console.phase("building datasets"):
            console._live.refresh()
            console.progress(2000, 20, "validating", 12, 50)
            console._live.refresh()
            console.log("a line")
    assert file.getvalue() == "a line\n"
    assert "building datasets" in visible(terminal.getvalue())
    assert "step 20/2,000  1%  validating 12/50" in visible(terminal.getvalue())
    assert visible(terminal.getvalue()).count("a line\n") == 1


def test_long_work_is_logged_every_30_seconds_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console, clock = Console(0, file), iter(range(0, 1000, 10))
    monkeypatch.setattr("hypermoe_ds.monitor.console.time.monotonic", lambda: next(clock))
    console._printed = 0
    for done in range(9):
        console.progress(2000, 20, "forward and backward", done)
        console.progress(2000, 20, "waiting for data")
        console.progress(2000, 20, "validating", done, 50)
    assert file.getvalue() == "step 20: validating 5/50\n"


class DueTimer:
    """A timer that calls its function as soon as it starts."""

    def __init__(self, seconds: float, function: Callable[[str], None], arguments: list[str]) -> None:
        self._call = lambda: function(f"{arguments[0]} {seconds} s")

    def start(self) -> None:
        self._call()

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize(("out", "lines"), [(io.StringIO(), ["building datasets ... 30 s"]), (Terminal(), [])])
def test_long_phase_is_logged_without_a_terminal(
    out: io.StringIO, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypermoe_ds.monitor.console.Timer", DueTimer)
    with Console(0, out).phase("building datasets"):
        pass
    assert out.getvalue().splitlines() == lines


@pytest.fixture
def package_logger() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """Return a logger of the package and the stream that the console prints to."""
    file = io.StringIO()
    with Console(0, file):
        yield logging.getLogger("hypermoe_ds.somewhere"), file


def test_messages_of_several_layers_are_joined(package_logger: tuple[logging.Logger, io.StringIO]) -> None:
    logger, file = package_logger
    for layer, count in ((0, 12), (1, 9), (2, 10), (4, 12)):
        logger.info("HyperExperts of MoE layer %d: factored, %d sets", layer, count)
    logger.info("HyperExperts of MoE layer 3: per_set, 8 sets")
    assert file.getvalue() == ""
    logger.info("step 1")
    assert file.getvalue().splitlines() == [
        "HyperExperts of MoE layers 0-2, 4: factored, 9-12 sets",
        "HyperExperts of MoE layer 3: per_set, 8 sets",
        "step 1",
    ]


def test_layer_messages_are_printed_when_the_console_closes() -> None:
    file = io.StringIO()
    with Console(0, file):
        logging.getLogger("hypermoe_ds.somewhere").info("layer 7: ready")
    assert file.getvalue() == "layer 7: ready\n"


@pytest.mark.parametrize("message", ["step 3 of layer 4", "layers", "layer x", "{} of layer 3"])
def test_messages_without_a_single_layer_are_not_joined(message: str) -> None:
    messages = LayerMessages()
    assert not messages.add(message)
    assert messages.take() == []


def test_console_prints_warnings_of_the_package_but_not_of_libraries() -> None:
    file, package = io.StringIO(), Path(hypermoe_ds.__file__).parent
    with warnings.catch_warnings(record=True) as other_warnings:
        warnings.simplefilter("always")
        with Console(0, file):
            logging.getLogger("hypermoe_ds.somewhere").warning("warning: marked")
            logging.getLogger("hypermoe_ds.somewhere").warning("not marked")
            warnings.warn_explicit("ours", UserWarning, str(package / "x.py"), 1)
            warnings.warn_explicit("theirs", UserWarning, "/lib/x.py", 1)
    assert file.getvalue().splitlines() == ["warning: marked", "warning: not marked", "warning: ours"]
    assert [str(warning.message) for warning in other_warnings] == ["theirs"]


def test_tables_in_a_file_have_120_columns_and_no_trailing_spaces() -> None:
    file = io.StringIO()
    Console(0, file).table([("a", "word " * 50), ("longer", "text")])
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert all(line == line.rstrip() for line in lines)
    assert [line[:8] for line in (lines[0], lines[-1])] == ["a       ", "longer  "]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0K"), (46_868, "46.9K"), (999_949, "999.9K"), (999_950, "1.0M"),
     (10_310_000, "10.3M"), (6_953_900_000, "7.0B"), (3e11, "300.0B"), (2.5e15, "2,500.0T")],
)  # fmt: skip
def test_readable_numbers_have_one_decimal_and_a_suffix(number: float, text: str) -> None:
    assert readable(number) == text


def test_counts_and_durations_are_formatted() -> None:
    assert (counted(1, "rank"), counted(2, "rank"), counted(1000, "host")) == ("1 rank", "2 ranks", "1,000 hosts")
    assert (duration(0), duration(59.6), duration(3725.4), duration(360000)) == (
        "0:00:00",
        "0:01:00",
        "1:02:05",
        "100:00:00",
    )
