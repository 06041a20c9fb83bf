"""Classify how each attempt to run a job ended, and decide whether to restart it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from hypermoe_ds.errors import EXIT_BAD_INPUT, EXIT_SAVED
from hypermoe_ds.resilience.heartbeat import Heartbeat

_UNMET_ATTEMPTS = 3


@dataclass(frozen=True)
class Attempt:
    """One launch of the job and its outcome.

    Attributes:
        began: start time in seconds since the epoch.
        seconds: duration.
        exit_code: exit code of the launcher.
        hosts: hosts that the ranks ran on.
        outcome: done; saved (the ranks saved a checkpoint and stopped after a signal); refused (bad input); error (a
            rank raised an exception); lost (a rank died or hung); unmet (the launch ended before all ranks had joined).
        step: last step that any rank worked on; None before the first step.
        what: one-line description of the outcome.
    """

    began: float
    seconds: float
    exit_code: int
    hosts: Sequence[str]
    outcome: str
    step: int | None
    what: str

    def same_failure(self, other: "Attempt") -> bool:
        """Return whether both attempts ended with the same error at the same step, ignoring numbers in the message."""
        same = self.outcome == other.outcome == "error" and self.step == other.step
        return same and _without_numbers(self.what) == _without_numbers(other.what)


def _without_numbers(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text)


class Decision(NamedTuple):
    """Whether to restart the job, and why."""

    again: bool
    why: str


class Limits(NamedTuple):
    """Limit on restarts after faults: at most `restarts` within `seconds`."""

    restarts: int
    seconds: float


def classify(
    began: float, now: float, exit_code: int, heartbeats: Mapping[int, Heartbeat], failure_report: str
) -> Attempt:
    """Classify an attempt that has ended.

    Args:
        began: start time in seconds since the epoch.
        now: end time in seconds since the epoch.
        exit_code: exit code of the launcher.
        heartbeats: last heartbeat of each rank.
        failure_report: failure report that the ranks wrote; empty if they wrote none.
    """
    step = max((heartbeat.step for heartbeat in heartbeats.values() if heartbeat.passed), default=None)
    failed = [heartbeat for _, heartbeat in sorted(heartbeats.items()) if heartbeat.end == "error"]
    ends = {heartbeat.end for heartbeat in heartbeats.values()}
    if exit_code == 0 and not ends & {"saved", "error", "lost"}:
        outcome, what = "done", ""
    elif exit_code == EXIT_SAVED or "saved" in ends:  # after a signal, a launcher may exit with its own code
        outcome, what = "saved", "a signal ended the attempt after a checkpoint"
    elif exit_code == EXIT_BAD_INPUT or any(heartbeat.error.startswith("UserError: ") for heartbeat in failed):
        outcome, what = "refused", failed[0].error if failed else "see the last line of the output"
    elif failed:
        outcome, what, step = "error", failed[0].error, failed[0].step if failed[0].passed else None
    elif not heartbeats:
        outcome, what = "unmet", "not all ranks had joined"
    else:
        outcome, what = "lost", failure_report or "ranks ended without an error"
    hosts = sorted({heartbeat.host for heartbeat in heartbeats.values()})
    return Attempt(began, now - began, exit_code, hosts, outcome, step, " ".join(what.split()))


def decide(attempts: Sequence[Attempt], limits: Limits) -> Decision:
    """Decide whether to restart the job after its last attempt."""
    last = attempts[-1]
    if last.outcome == "done":
        return Decision(False, "done")
    if last.outcome == "saved":
        return Decision(True, f"saved at step {last.step} on a signal")
    reason = _reason_to_stop(attempts, limits)
    return Decision(not reason, reason or last.what)


def _reason_to_stop(attempts: Sequence[Attempt], limits: Limits) -> str:
    """Return the reason not to restart the job; an empty string means that the job should be restarted."""
    last = attempts[-1]
    previous = attempts[-2] if len(attempts) > 1 else None
    # A refusal after a different outcome may be temporary: a lost rank may still hold the lock on the run folder.
    if last.outcome == "refused" and (previous is None or previous.outcome == "refused"):
        return f"bad input, which a restart does not fix: {last.what}"
    if previous is not None and last.same_failure(previous):
        return f"the same error at step {last.step} as in the attempt before: {last.what}"
    if [attempt.outcome for attempt in attempts[-_UNMET_ATTEMPTS:]] == ["unmet"] * _UNMET_ATTEMPTS:
        return f"{_UNMET_ATTEMPTS} attempts in a row ended before all ranks had joined"
    now = last.began + last.seconds
    recent = [attempt for attempt in attempts if now - attempt.began - attempt.seconds < limits.seconds]
    faults = sum(attempt.outcome != "saved" for attempt in recent)
    if faults > limits.restarts:
        return f"{faults} faults within {limits.seconds:.0f} s; the last one was: {last.what}"
    return ""


class HistoryFile:
    """The file RUN_DIR/supervisor.jsonl, with one JSON object per attempt, including those of earlier supervisors."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, attempt: Attempt) -> None:
        """Append an attempt to the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(attempt)) + "\n")
