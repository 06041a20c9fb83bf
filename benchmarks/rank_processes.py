"""Starts the rank processes of a side, sends them commands and collects their answers, one JSON object a line."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch.distributed import TCPStore  # type: ignore[attr-defined]

Ranks = list[tuple[subprocess.Popen[str], TextIO, Path]]  # each with its answers and the file of what it prints
Answers = list[dict[str, Any]]

_RANK = Path(__file__).with_name("rank.py")


@contextmanager
def started(side: str, settings: Mapping[str, Any], ranks: int, threads: int) -> Iterator[Ranks]:
    """The ranks of one side, building; they are ended on leaving.

    Args:
        side: what they build.
        settings: as `sides.build` and rank.py read them.
        ranks: how many.
        threads: CPU threads of each.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # The store holds its port from the start, so that sides beside each other never meet.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja
            "OMP_NUM_THREADS": str(threads),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        started_ranks: Ranks = []
        stack.callback(_end, started_ranks)
        for rank in range(ranks):
            log = folder / f"rank{rank}"
            ours, theirs = os.pipe()
            command = [sys.executable, str(_RANK), side, json.dumps(settings), str(theirs)]
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as printed:
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": printed, "stderr": printed}
                process = subprocess.Popen(command, env=environment, text=True, pass_fds=(theirs,), **pipes)
            os.close(theirs)  # or its end would not be seen
            started_ranks.append((process, os.fdopen(ours), log))
        yield started_ranks


def ask(ranks: Ranks, **command: Any) -> Answers:
    """Send a command to all ranks and wait for every answer.

    Raises:
        RuntimeError: a rank ended; the message is the end of what it said.
        MemoryError: the device's memory did not suffice.
    """
    for process, _, log in ranks:
        try:
            process.stdin.write(json.dumps(command) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            raise _failure(process, log) from None
    return answers_of(ranks)


def answers_of(ranks: Ranks) -> Answers:
    """One answer of every rank, in their order; also the first, which tells that a rank has been built."""
    answers: dict[int, dict[str, Any]] = {}
    waiting = {stream: number for number, (_, stream, _) in enumerate(ranks)}
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [])
        for stream in ready:
            number = waiting.pop(stream)
            line = stream.readline()
            if not line:
                process, _, log = ranks[number]
                raise _failure(process, log)
            answers[number] = json.loads(line)
            if "out_of_memory" in answers[number]:
                raise MemoryError  # at once: the other ranks may wait for this one
    return [answers[number] for number in range(len(ranks))]


def _failure(process: subprocess.Popen[str], log: Path) -> RuntimeError:
    code = process.wait()
    return RuntimeError(f"a rank ended with exit code {code}:\n{log.read_text(errors='replace')[-4000:]}")


def _end(ranks: Ranks) -> None:
    for process, _, _ in ranks:
        process.kill()
    for process, answers, _ in ranks:
        process.communicate()
        answers.close()
