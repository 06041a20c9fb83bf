"""Progress is shown as a bar on a terminal, and otherwise as a line every 30 seconds."""

import io
import sys

import pytest

from hypermoe_ds import progress as module
from hypermoe_ds.progress import Progress, progress


class Terminal(io.StringIO):
    """Text stream that pretends to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_long_work_prints_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Progress("tokenise", "documents", note=lambda: f"at {clock[0]:.0f} s") as shown:
        for _ in range(9):
            clock[0] += 10
            shown.update(500)
    assert capsys.readouterr().err.splitlines() == [
        "tokenise: 1,500 documents, at 30 s",
        "tokenise: 3,000 documents, at 60 s",
        "tokenise: 4,500 documents, at 90 s",
    ]


def test_without_a_terminal_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("abc", "read", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_progress_line_includes_the_total_if_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, *[40.0] * 9])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    assert len(list(progress(range(2), "convert", "tensors", 2))) == 2
    assert capsys.readouterr().err == "convert: 1 of 2 tensors\n"


def test_on_a_terminal_a_progress_bar_is_shown_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("convert", "tensors", 2) as shown:
        shown.update(2)
    assert "convert:" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the cursor returns to the start of the line"
