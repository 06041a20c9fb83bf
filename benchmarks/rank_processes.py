"""Start the rank processes of a side, send them commands and collect their answers, one JSON object per line."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from step_settings import StepSettings

_RANK = Path(__file__).with_name("rank.py")


@dataclass(frozen=True)
class Rank:
    """A running rank process.

    Attributes:
        process: the process, which reads commands from stdin.
        answers: the pipe to read answers from.
        log: the file that stdout and stderr are written to.
    """

    process: subprocess.Popen[str]
    answers: TextIO
    log: Path

    def failure(self) -> RuntimeError:
        """Wait for the process to exit, and return an error with the exit code and the end of the log."""
        code = self.process.wait()
        return RuntimeError(f"a rank exited with code {code}:\n{self.log.read_text(errors='replace')[-4000:]}")


@contextmanager
def start_side(side: str, settings: StepSettings) -> Iterator[list[Rank]]:
    """Start the rank processes of one side, and kill them on exit. Each rank first builds its model."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # The store binds its port before the ranks start, so sides that run at the same time use different ports.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # for ninja
            "OMP_NUM_THREADS": str(settings.threads),
            "WORLD_SIZE": str(settings.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        ranks: list[Rank] = []
        stack.callback(_kill, ranks)
        for rank in range(settings.ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(_start_rank(side, settings, environment, folder / f"rank{rank}"))
        yield ranks


def _start_rank(side: str, settings: StepSettings, environment: dict[str, str], log: Path) -> Rank:
    read_end, write_end = os.pipe()
    command = [sys.executable, str(_RANK), side, settings.to_json(), str(write_end)]
    with log.open("w") as output:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
        process = subprocess.Popen(command, env=environment, text=True, pass_fds=(write_end,), **pipes)
    os.close(write_end)  # if this end stayed open, reading answers would block after the rank has exited
    return Rank(process, os.fdopen(read_end), log)


def ask(ranks: list[Rank], **command: Any) -> list[dict[str, Any]]:
    """Send a command to all ranks and return their answers.

    Raises:
        RuntimeError: a rank exited; the message contains the end of the rank's log.
        MemoryError: the device is out of memory.
    """
    for rank in ranks:
        try:
            rank.process.stdin.write(json.dumps(command) + "\n")  # type: ignore[union-attr]
            rank.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            raise rank.failure() from None
    return read_answers(ranks)


def read_answers(ranks: list[Rank]) -> list[dict[str, Any]]:
    """Read one answer from every rank, in rank order. The first answer reports that the rank has built its model.

    Raises:
        RuntimeError: see `ask`.
        MemoryError: see `ask`.
    """
    answers: dict[int, dict[str, Any]] = {}
    waiting = {rank.answers: number for number, rank in enumerate(ranks)}
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [])
        for stream in ready:
            number = waiting.pop(stream)
            line = stream.readline()
            if not line:
                raise ranks[number].failure()
            answers[number] = json.loads(line)
            if "out_of_memory" in answers[number]:
                raise MemoryError  # do not wait for the other ranks, which may be waiting for this rank
    return [answers[number] for number in range(len(ranks))]


def _kill(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.communicate()
        rank.answers.close()
