"""Redirect the output of libraries to a log file per rank, so that the terminal shows only the run's own messages."""

import faulthandler
import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hypermoe_ds.errors import UserError
from hypermoe_ds.process import global_rank

_LEVELS = ("debug", "info", "warning", "error", "critical")
_VARIABLE = "HYPERMOE_LOG_LEVEL"


@dataclass(frozen=True)
class OutputStreams:
    """Output streams of a rank.

    Attributes:
        out: the original stdout of the rank.
        err: the original stderr of the rank.
        log: file for all other output; None if nothing is redirected.
        level: log level of libraries.
    """

    out: TextIO
    err: TextIO
    log: Path | None
    level: str


def restore_terminal() -> None:
    """Reopen the terminal of launch/local.sh, which redirects the output of DeepSpeed's launcher to a file."""
    folder = os.environ.get("HYPERMOE_SCREEN")
    for number, kept in ((1, 3), (2, 4)) if folder else ():
        with suppress(OSError):  # a socket cannot be opened; the output then stays in the file
            terminal = os.open(f"{folder}/{kept}", os.O_WRONLY | os.O_APPEND)
            os.dup2(terminal, number)
            os.close(terminal)


def log_level(verbose: bool) -> str | None:
    """Return the log level of libraries on the terminal; None if they log to a file.

    Args:
        verbose: whether `--verbose` is given; HYPERMOE_LOG_LEVEL takes precedence.

    Raises:
        UserError: HYPERMOE_LOG_LEVEL is not a log level.
    """
    given = os.environ.get(_VARIABLE)
    if given and given.lower() not in _LEVELS:
        raise UserError(f"{_VARIABLE}={given}", "is not a log level", f"set it to one of {', '.join(_LEVELS)}")
    return (given or ("info" if verbose else "")).upper() or None


def redirect_output(run_dir: Path, level: str | None) -> OutputStreams:
    """Redirect stdout and stderr, including those of C++ code, to RUN_DIR/logs/rank_00000.log, and set up `logging`.

    Args:
        run_dir: the run folder; created if it is missing.
        level: log level of libraries on the terminal. If None, all output is redirected to the file;
            otherwise, nothing is redirected.

    Raises:
        UserError: the file cannot be written.
    """
    if level is not None:
        logging.basicConfig(level=level)
        logging.getLogger("hypermoe_ds").propagate = False  # the console prints these messages
        return OutputStreams(sys.stdout, sys.stderr, None, level)
    log = run_dir / "logs" / f"rank_{global_rank():05d}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(
            f"run.dir={run_dir}", f"cannot be written ({error.strerror})", "choose another run.dir"
        ) from None
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (os.fdopen(os.dup(number), "w", encoding="utf-8", errors="replace") for number in (1, 2))
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"\n=== launch of {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}")
    faulthandler.enable()  # writes the stacks if a signal such as SIGSEGV kills the rank
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return OutputStreams(out, err, log, "INFO")
