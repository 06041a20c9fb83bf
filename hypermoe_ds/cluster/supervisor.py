"""Run a job and restart it after a fault."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from hypermoe_ds.cluster.attempts import Attempt, HistoryFile, Limits, classify, decide
from hypermoe_ds.cluster.host_selection import HostSelector, SelectedHosts
from hypermoe_ds.cluster.job_processes import RANK_VARIABLES, JobProcesses
from hypermoe_ds.cluster.training_command import HOSTS, TrainingCommand
from hypermoe_ds.errors import EXIT_SAVED, UserError
from hypermoe_ds.resilience.heartbeat import FAILURE_REPORT, Heartbeat, heartbeat_path, read_heartbeats

_POLL_SECONDS = 0.2
_SECONDS_AFTER_REPORT = 15.0  # after a failure report, ranks exit at once or are killed 10 s later
_SECONDS_TO_SAVE = 60
_SECONDS_AFTER_REFUSAL = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 600.0  # seconds between two searches for usable hosts


class Supervisor:
    """Restart a job until it is done, a signal stops it, or a restart would not help.

    Args:
        command: the training command.
        limits: limit on restarts.
        choice: selects the hosts of each attempt; None to run the command as it is, without a hostfile.

    Raises:
        UserError: the command contains `{hosts}` or `--hostfile`, but `choice` is None.
    """

    def __init__(self, command: TrainingCommand, limits: Limits, choice: HostSelector | None) -> None:
        if choice is None and any(HOSTS in word for word in command.words):
            raise UserError(HOSTS, "is in the command, but --hostfile is missing", "give --hostfile")
        if choice is None and any(word.startswith("--hostfile") for word in command.words):
            remedy = f"give it before --, and write --hostfile {HOSTS} in the command"
            raise UserError(
                "--hostfile", "must be given to the supervisor, which ends leftover processes on its hosts", remedy
            )
        self._command = command
        self._limits = limits
        self._choice = choice
        self._processes = JobProcesses(choice.hosts if choice else [])
        self._history = HistoryFile(command.run_dir / "supervisor.jsonl")
        self._stop_requested = False

    def run(self) -> int:
        """Run the job, with restarts, and return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or `&` in a script, makes a process ignore some
                signal.signal(number, self._request_stop)
        attempts: list[Attempt] = []
        while True:
            words = self._words(patient=bool(attempts))
            if self._stop_requested:
                return _exit_code(attempts)
            attempts.append(self._run_attempt(words))
            try:
                self._history.append(attempts[-1])
            except OSError as error:
                _log(f"cannot record this attempt ({error})")
            decision = decide(attempts, self._limits)
            again = decision.again and not self._stop_requested
            step = "before the first step" if attempts[-1].step is None else f"in step {attempts[-1].step}"
            _log(f"attempt {len(attempts)} ended {step} with exit code {attempts[-1].exit_code}: {decision.why}")
            if not again:
                _log("the job is not restarted" if decision.why != "done" else "the run is done")
                return _exit_code(attempts)
            if attempts[-1].outcome == "refused":
                self._sleep(_SECONDS_AFTER_REFUSAL)
            _log("restarting from the newest checkpoint")

    def _request_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stop_requested = True

    def _words(self, patient: bool) -> list[str]:
        """Return the command of the next attempt, after waiting for usable hosts or a signal.

        Raises:
            UserError: no host is usable, and `patient` is false.
        """
        if self._choice is None:
            return self._command.started_with(None, [])
        pause = _FIRST_PAUSE
        self._processes.end(0)  # on hosts that were unreachable when the last attempt ended
        while (chosen := self._choice.choose()) is None and not self._stop_requested:
            if not patient:
                raise UserError("--hostfile", "no host can train", "fix the problems listed above")
            _log(f"no host can train; checking again in {pause:.0f} s")
            self._sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._command.started_with(*(chosen or SelectedHosts(Path(), [])))

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stop_requested:
            time.sleep(_POLL_SECONDS)

    def _run_attempt(self, words: Sequence[str]) -> Attempt:
        """Run one attempt, and return when the launcher and all processes of the job have ended."""
        watch = _WatchFolder(self._command.run_dir / "watch")
        began = time.time()
        try:
            environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
            environment |= self._processes.environment
            launcher = subprocess.Popen(words, start_new_session=True, env=environment)
        except OSError as error:
            raise UserError(words[0], f"cannot be started ({error.strerror})", "correct the command after --") from None
        self._wait(launcher, watch)
        self._processes.end(0 if watch.failure_report() else _SECONDS_TO_SAVE)
        code = launcher.returncode
        return classify(
            began, time.time(), 128 - code if code < 0 else code, watch.heartbeats(), watch.failure_report()
        )

    def _wait(self, launcher: "subprocess.Popen[bytes]", watch: "_WatchFolder") -> None:
        """Wait until the launcher ends; forward a stop signal to the ranks once, and kill a launcher that hangs.

        The launcher is killed with SIGKILL. After other signals, DeepSpeed's launcher would kill all jobs on the hosts
        that use the same Python. It would kill its own ranks only after 30 s.
        """
        passed_on = False
        deadline: float | None = None
        while launcher.poll() is None:
            time.sleep(_POLL_SECONDS)
            if self._stop_requested and not passed_on:
                passed_on = True  # forward every signal as SIGTERM, because ranks may ignore SIGINT and SIGHUP
                if not self._processes.signal_ranks(signal.SIGTERM) or not watch.heartbeats():  # nothing to save yet
                    deadline = time.monotonic()
            if deadline is None and watch.failure_report():
                deadline = time.monotonic() + _SECONDS_AFTER_REPORT
            if deadline is not None and time.monotonic() > deadline:
                os.killpg(launcher.pid, signal.SIGKILL)


class _WatchFolder:
    """Read RUN_DIR/watch, but ignore files from earlier attempts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._old = {path.name: _changed_at(path) for path in folder.glob("*")}

    def heartbeats(self) -> dict[int, Heartbeat]:
        """Return the heartbeats of the ranks."""
        return {
            rank: heartbeat
            for rank, heartbeat in read_heartbeats(self._folder).items()
            if self._is_new(heartbeat_path(self._folder, rank))
        }

    def failure_report(self) -> str:
        """Return the failure report that the ranks wrote; empty if they wrote none."""
        path = self._folder / FAILURE_REPORT
        with suppress(OSError):
            return path.read_text() if self._is_new(path) else ""
        return ""

    def _is_new(self, path: Path) -> bool:
        changed = _changed_at(path)
        return changed is not None and changed != self._old.get(path.name)


def _changed_at(path: Path) -> int | None:
    """Return the modification time in ns; None if the file is missing or its storage does not respond."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def _exit_code(attempts: Sequence[Attempt]) -> int:
    return EXIT_SAVED if not attempts or attempts[-1].outcome == "saved" else attempts[-1].exit_code


def _log(line: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(f"supervisor: {line}", flush=True)
