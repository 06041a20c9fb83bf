"""Report errors to users in one line: the location, the problem and the remedy."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

EXIT_BAD_INPUT = 2  # argparse's exit code for usage errors
EXIT_SAVED = 75  # EX_TEMPFAIL: a signal stopped the run, which saved a checkpoint; the same command resumes the run
EXIT_FAULT = 76  # a rank died or hung, or memory is faulty; the same command resumes from the last checkpoint
_LONGEST_PART = 1500  # characters; a list of all settings fits, but user input can be longer


class UserError(Exception):
    """Invalid user input, reported in one line.

    Args:
        where: the invalid key and value, such as ``parallel.expert=3``, or the invalid file.
        problem: what is wrong with the key or file.
        remedy: how to correct the error.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        # All arguments are passed on, so that the error can be pickled and sent to other ranks.
        super().__init__(where, problem, remedy)

    def __str__(self) -> str:
        where, problem, remedy = (shortened(part) for part in self.args)
        return f"{where}: {problem}; {remedy}"


def shortened(text: str) -> str:
    """Truncate a part of a message to 1,500 characters and append its length; user input can be megabytes long."""
    return text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]}... ({len(text):,} characters)"


class MachineError(Exception):
    """A failure of a machine or a rank, reported in one line. The last checkpoint is not affected."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert an `OSError` to a `MachineError` that names the file, or `path` if the error has no file name."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{error.filename or path}: cannot be written ({error.strerror})") from None


def print_error(message: str, err: TextIO | None = None) -> None:
    """Print an error as one line on `err` or stderr. On a terminal, the error overwrites the status line."""
    stream = err or sys.stderr
    over_status = "\r\x1b[K" if stream.isatty() else ""
    print(f"{over_status}error: {' '.join(message.split())}", file=stream, flush=True)
