"""Runs a job's command, again and again if need be."""

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from hypermoe_ds.config import apply_overrides, load_yaml
from hypermoe_ds.errors import EXIT_SAVED, UserError
from hypermoe_ds.monitor.signs import VERDICT, SignOfLife, read_signs, sign_path
from hypermoe_ds.supervision.history import HistoryFile, Limits, Try, decide, ended

_POLL_SECONDS = 0.2
_SECONDS_AFTER_VERDICT = 60.0  # DeepSpeed's launcher gives a stopped rank 30
_SECONDS_TO_SAVE = 60.0
_HOSTS = "{hosts}"


def run_dir_of(command: Sequence[str]) -> Path:
    """The run folder that a training command names.

    Raises:
        UserError: no train.py with its `--config` in it, or a recipe that cannot be read.
    """
    scripts = [place for place, word in enumerate(command) if word.endswith("train.py")]
    words = list(command[scripts[0] + 1 :]) if scripts else []
    recipe = next((word.partition("=")[2] for word in words if word.startswith("--config=")), None)
    if "--config" in words[:-1]:
        recipe = words[words.index("--config") + 1]
    if recipe is None:
        raise UserError(shlex.join(command), "is no training command", "give `deepspeed ... train.py --config ...`")
    overrides = [word for word in words if not word.startswith("-") and "=" in word]
    folder = apply_overrides(load_yaml(recipe), overrides).get("run", {}).get("dir")
    if folder is None:
        raise UserError(f"{recipe}: run.dir", "is missing", "give the run folder")
    return Path(folder)


class Supervisor:
    """Starts a job until it is done, a signal ends it, or starting it again makes no sense.

    Args:
        command: the training command; `{hosts}` in it becomes the file that `hosts_command` fills.
        limits: how often to start again.
        hosts_command: prints a hostfile, run before each try; None for none.
    """

    def __init__(self, command: Sequence[str], limits: Limits, hosts_command: str | None) -> None:
        self._run = run_dir_of(command)
        self._command = [*command, "checkpoint.resume=auto"]
        self._limits = limits
        self._hosts_command = hosts_command
        self._history = HistoryFile(self._run / "supervisor.jsonl")
        self._signal: int | None = None

    def run(self) -> int:
        """Until the end; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)
        tries: list[Try] = []
        while True:
            tries.append(self._try())
            self._history.append(tries[-1])
            decision = decide(tries, self._limits)
            again = decision.again and self._signal is None
            step = "before the first step" if tries[-1].step is None else f"in step {tries[-1].step}"
            _say(f"try {len(tries)} ended {step} with exit code {tries[-1].exit_code}: {decision.why}")
            if not again:
                _say("not started again" if decision.why != "done" else "the run is done")
                return EXIT_SAVED if tries[-1].outcome == "saved" else tries[-1].exit_code
            _say("starting again from the newest checkpoint")

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def _try(self) -> Try:
        """One start: the launcher and all that it leaves behind have ended when this returns."""
        words = [word.replace(_HOSTS, str(self._hosts())) if _HOSTS in word else word for word in self._command]
        watch = _WatchFolder(self._run / "watch")
        began = time.time()
        try:
            launcher = subprocess.Popen(words, start_new_session=True)
        except OSError as error:
            raise UserError(words[0], f"cannot be started ({error.strerror})", "mend the command after --") from None
        self._wait(launcher, watch)
        _end_group(launcher.pid)
        code = launcher.returncode
        return ended(began, time.time(), 128 - code if code < 0 else code, watch.signs(), watch.verdict())

    def _wait(self, launcher: "subprocess.Popen[bytes]", watch: "_WatchFolder") -> None:
        """Until the launcher has ended, passing a signal on once, or until it is clear that it never will."""
        passed_on = False
        latest: float | None = None
        while launcher.poll() is None:
            time.sleep(_POLL_SECONDS)
            if self._signal is not None and not passed_on:
                self._pass_on(launcher.pid, watch.signs(), self._signal)
                passed_on = True
            if latest is None and watch.verdict():
                latest = time.monotonic() + _SECONDS_AFTER_VERDICT
            if latest is not None and time.monotonic() > latest:
                os.killpg(launcher.pid, signal.SIGKILL)

    def _pass_on(self, group: int, signs: dict[int, SignOfLife], number: int) -> None:
        """To a rank of this host: all ranks hear of it. DeepSpeed's launcher would kill them 30 s after it."""
        for sign in signs.values():
            if sign.host == socket.gethostname() and not sign.end:
                with suppress(ProcessLookupError):
                    os.kill(sign.process, number)
                    return
        os.killpg(group, number)

    def _hosts(self) -> Path:
        if self._hosts_command is None:
            raise UserError(_HOSTS, "stands in the command and there is no --hosts-command", "give one")
        done = subprocess.run(shlex.split(self._hosts_command), stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode or not done.stdout.strip():
            raise UserError(f"--hosts-command {self._hosts_command}", "names no hosts", "mend it and start again")
        path = self._run / "hosts"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout)
        return path


class _WatchFolder:
    """What is written into RUN_DIR/watch from now on; what lies there already is of an earlier try."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._old = {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}

    def signs(self) -> dict[int, SignOfLife]:
        """The ranks' signs of life."""
        return {rank: s for rank, s in read_signs(self._folder).items() if self._is_new(sign_path(self._folder, rank))}

    def verdict(self) -> str:
        """What a rank told of one that was lost; empty for none."""
        path = self._folder / VERDICT
        return path.read_text() if self._is_new(path) else ""

    def _is_new(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.stat().st_mtime_ns != self._old.get(path.name)
        return False


def _end_group(group: int) -> None:
    """End what a launcher left behind: ranks may still save, then nothing runs on."""

    def left() -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _is_in(process, group)]

    for number, seconds in ((signal.SIGTERM, _SECONDS_TO_SAVE), (signal.SIGKILL, 10.0)):
        if not left():
            return
        with suppress(ProcessLookupError):
            os.killpg(group, number)
        psutil.wait_procs(left(), timeout=seconds)


def _is_in(process: psutil.Process, group: int) -> bool:
    with suppress(psutil.Error, ProcessLookupError):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


def _say(line: str) -> None:
    print(f"supervisor: {line}", flush=True)
