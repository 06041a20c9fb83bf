"""Runs a job's command, again and again if need be."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from hypermoe_ds.cluster.attempts import Attempt, HistoryFile, Limits, classify, decide
from hypermoe_ds.cluster.host_selection import Chosen, HostChoice
from hypermoe_ds.cluster.job_processes import RANK_VARIABLES, JobProcesses
from hypermoe_ds.cluster.training_command import HOSTS, TrainingCommand
from hypermoe_ds.errors import EXIT_SAVED, UserError
from hypermoe_ds.resilience.heartbeat import FAILURE_REPORT, Heartbeat, heartbeat_path, read_heartbeats

_POLL_SECONDS = 0.2
_SECONDS_AFTER_VERDICT = 15.0  # ranks end themselves at once, or are ended 10 s later
_SECONDS_TO_SAVE = 60
_SECONDS_AFTER_REFUSAL = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 600.0  # between two looks for hosts


class Supervisor:
    """Starts a job until it is done, a signal ends it, or starting it again makes no sense.

    Args:
        command: the training command.
        limits: how often to start again.
        choice: finds the hosts of each try; None where the command knows its own.
    """

    def __init__(self, command: TrainingCommand, limits: Limits, choice: HostChoice | None) -> None:
        if choice is None and any(HOSTS in word for word in command.words):
            raise UserError(HOSTS, "stands in the command and there is no --hostfile", "give one")
        if choice is None and any(word.startswith("--hostfile") for word in command.words):
            remedy = f"give it before --, and --hostfile {HOSTS} in the command"
            raise UserError(
                "--hostfile", "must be known to the supervisor, which ends what is left on its hosts", remedy
            )
        self._command = command
        self._limits = limits
        self._choice = choice
        self._processes = JobProcesses(choice.hosts if choice else [])
        self._history = HistoryFile(command.run_dir / "supervisor.jsonl")
        self._asked_to_end = False

    def run(self) -> int:
        """Until the end; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a script's `&` have it
                signal.signal(number, self._note)
        attempts: list[Attempt] = []
        while True:
            words = self._words(patient=bool(attempts))
            if self._asked_to_end:
                return _exit_code(attempts)
            attempts.append(self._run_attempt(words))
            try:
                self._history.append(attempts[-1])
            except OSError as error:
                _say(f"what ended this try could not be kept ({error})")
            decision = decide(attempts, self._limits)
            again = decision.again and not self._asked_to_end
            step = "before the first step" if attempts[-1].step is None else f"in step {attempts[-1].step}"
            _say(f"try {len(attempts)} ended {step} with exit code {attempts[-1].exit_code}: {decision.why}")
            if not again:
                _say("not started again" if decision.why != "done" else "the run is done")
                return _exit_code(attempts)
            if attempts[-1].outcome == "refused":
                self._rest(_SECONDS_AFTER_REFUSAL)
            _say("starting again from the newest checkpoint")

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._asked_to_end = True

    def _words(self, patient: bool) -> list[str]:
        """The command of the next try, once there are hosts for it or a signal has come.

        Raises:
            UserError: there are none, and it is not `patient`.
        """
        if self._choice is None:
            return self._command.started_with(None, [])
        pause = _FIRST_PAUSE
        self._processes.end(0)  # on hosts that could not be reached when their try ended
        while (chosen := self._choice.choose()) is None and not self._asked_to_end:
            if not patient:
                raise UserError("--hostfile", "no host can train", "mend what the lines above name")
            _say(f"no host can train; looking again in {pause:.0f} s")
            self._rest(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._command.started_with(*(chosen or Chosen(Path(), [])))

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._asked_to_end:
            time.sleep(_POLL_SECONDS)

    def _run_attempt(self, words: Sequence[str]) -> Attempt:
        """One start: the launcher and all that it leaves behind have ended when this returns."""
        watch = _WatchFolder(self._command.run_dir / "watch")
        began = time.time()
        try:
            environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
            environment |= self._processes.environment
            launcher = subprocess.Popen(words, start_new_session=True, env=environment)
        except OSError as error:
            raise UserError(words[0], f"cannot be started ({error.strerror})", "mend the command after --") from None
        self._wait(launcher, watch)
        self._processes.end(0 if watch.failure_report() else _SECONDS_TO_SAVE)
        code = launcher.returncode
        return classify(
            began, time.time(), 128 - code if code < 0 else code, watch.heartbeats(), watch.failure_report()
        )

    def _wait(self, launcher: "subprocess.Popen[bytes]", watch: "_WatchFolder") -> None:
        """Until the launcher has ended, passing a signal on once, or until it is clear that it never will.

        It is killed, not signalled: DeepSpeed's would end all jobs of this Python on its hosts, and ranks 30 s later.
        """
        passed_on = False
        latest: float | None = None
        while launcher.poll() is None:
            time.sleep(_POLL_SECONDS)
            if self._asked_to_end and not passed_on:
                passed_on = True  # as SIGTERM: what the terminal sends, the command may have its ranks ignore
                if not self._processes.signal_ranks(signal.SIGTERM) or not watch.heartbeats():  # nothing to save yet
                    latest = time.monotonic()
            if latest is None and watch.failure_report():
                latest = time.monotonic() + _SECONDS_AFTER_VERDICT
            if latest is not None and time.monotonic() > latest:
                os.killpg(launcher.pid, signal.SIGKILL)


class _WatchFolder:
    """What is written into RUN_DIR/watch from now on; what lies there already is of an earlier try."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._old = {path.name: _changed_at(path) for path in folder.glob("*")}

    def heartbeats(self) -> dict[int, Heartbeat]:
        """The ranks' signs of life."""
        return {
            rank: s
            for rank, s in read_heartbeats(self._folder).items()
            if self._is_new(heartbeat_path(self._folder, rank))
        }

    def failure_report(self) -> str:
        """What a rank told of one that was lost; empty for none."""
        path = self._folder / FAILURE_REPORT
        with suppress(OSError):
            return path.read_text() if self._is_new(path) else ""
        return ""

    def _is_new(self, path: Path) -> bool:
        changed = _changed_at(path)
        return changed is not None and changed != self._old.get(path.name)


def _changed_at(path: Path) -> int | None:
    """None where it is not there, or its storage does not answer."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def _exit_code(attempts: Sequence[Attempt]) -> int:
    return EXIT_SAVED if not attempts or attempts[-1].outcome == "saved" else attempts[-1].exit_code


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"supervisor: {line}", flush=True)
