"""Errors for the user: one line with the location, the problem and the remedy."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

EXIT_BAD_INPUT = 2  # as argparse uses for wrong usage
EXIT_SAVED = 75  # EX_TEMPFAIL: a signal ended the run after a checkpoint; the same command continues it
EXIT_FAULT = 76  # a rank died or hung, or memory is faulty; the same command resumes from the last checkpoint
_LONGEST_PART = 1500  # characters; enough for a list of all settings, and user values may be longer


class UserError(Exception):
    """Bad input of the user, reported in one line.

    Args:
        where: the key or file at fault, with its value, such as ``parallel.expert=3``.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__(
            where, problem, remedy
        )  # as arguments, so that the error can be pickled and sent to other ranks

    def __str__(self) -> str:
        where, problem, remedy = (shortened(part) for part in self.args)
        return f"{where}: {problem}; {remedy}"


def shortened(text: str) -> str:
    """Cut a part of a message to 1,500 characters and add its length: values may be megabytes."""
    return text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]}... ({len(text):,} characters)"


class MachineError(Exception):
    """A failure of a machine or a rank, reported in one line; it does not affect the last checkpoint."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert an `OSError` to a `MachineError` that names the file, or `path` if the error has no file name."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{error.filename or path}: cannot be written ({error.strerror})") from None


def print_error(message: str, err: TextIO | None = None) -> None:
    """Print an error as one line on `err` or stderr; on a terminal it replaces the status line."""
    stream = err or sys.stderr
    over_status = "\r\x1b[K" if stream.isatty() else ""
    print(f"{over_status}error: {' '.join(message.split())}", file=stream, flush=True)
