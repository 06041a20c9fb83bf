"""What ended each try of a job, and whether another one makes sense."""

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
    """One start of the job.

    Attributes:
        began: seconds since the epoch.
        seconds: how long it ran.
        exit_code: of the launcher.
        hosts: where its ranks ran.
        outcome: done; saved (a signal ended it after a checkpoint); refused (bad input); error (a rank told one);
            lost (a rank was); unmet (it ended before its ranks had met).
        step: last step that a rank worked on, None before the first.
        what: what is known of the end, in one line.
    """

    began: float
    seconds: float
    exit_code: int
    hosts: Sequence[str]
    outcome: str
    step: int | None
    what: str

    def same_failure(self, other: "Attempt") -> bool:
        """Whether both ended by the same error at the same step, but for numbers such as addresses."""
        same = self.outcome == other.outcome == "error" and self.step == other.step
        return same and _without_numbers(self.what) == _without_numbers(other.what)


def _without_numbers(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text)


class Decision(NamedTuple):
    """Whether to start again, and why."""

    again: bool
    why: str


class Limits(NamedTuple):
    """How often to start again after a fault: `restarts` times within `seconds`."""

    restarts: int
    seconds: float


def classify(
    began: float, now: float, exit_code: int, heartbeats: Mapping[int, Heartbeat], failure_report: str
) -> Attempt:
    """What a try came to.

    Args:
        began: when it did.
        now: when it ended.
        exit_code: of the launcher.
        signs: the ranks' last signs of life in it.
        verdict: what a rank told of one that was lost; empty for none.
    """
    step = max((heartbeat.step for heartbeat in heartbeats.values() if heartbeat.passed), default=None)
    failed = [heartbeat for _, heartbeat in sorted(heartbeats.items()) if heartbeat.end == "error"]
    saved = any(heartbeat.end == "saved" for heartbeat in heartbeats.values())
    if exit_code == 0 and not any(heartbeat.end in ("saved", "error", "lost") for heartbeat in heartbeats.values()):
        outcome, what = "done", ""
    elif exit_code == EXIT_SAVED or saved:  # the launcher has a code of its own where it got the signal
        outcome, what = "saved", "a signal ended it after a checkpoint"
    elif exit_code == EXIT_BAD_INPUT or any(heartbeat.error.startswith("UserError: ") for heartbeat in failed):
        outcome, what = "refused", failed[0].error if failed else "see its last line"
    elif failed:
        outcome, what, step = "error", failed[0].error, failed[0].step if failed[0].passed else None
    elif not heartbeats:
        outcome, what = "unmet", "it ended before its ranks had met"
    else:
        outcome, what = "lost", failure_report or "ranks ended without a word"
    hosts = sorted({heartbeat.host for heartbeat in heartbeats.values()})
    return Attempt(began, now - began, exit_code, hosts, outcome, step, " ".join(what.split()))


def decide(attempts: Sequence[Attempt], limits: Limits) -> Decision:
    """Whether to start again after the last of the tries."""
    last = attempts[-1]
    if last.outcome == "done":
        return Decision(False, "done")
    if last.outcome == "saved":
        return Decision(True, f"saved at step {last.step} on a signal")
    reason = _reason_to_stop(attempts, limits)
    return Decision(not reason, reason or last.what)


def _reason_to_stop(attempts: Sequence[Attempt], limits: Limits) -> str:
    """Why another start makes no sense; empty where it may."""
    last = attempts[-1]
    if last.outcome == "refused" and attempts[-2:][0].outcome == "refused":  # a lost rank may hold the folder a while
        return f"a mistake in the settings, which a new start does not mend: {last.what}"
    if len(attempts) > 1 and last.same_failure(attempts[-2]):
        return f"the same error at step {last.step} as in the try before: {last.what}"
    if [entry.outcome for entry in attempts[-_UNMET_ATTEMPTS:]] == ["unmet"] * _UNMET_ATTEMPTS:
        return f"{_UNMET_ATTEMPTS} tries in a row ended before their ranks had met"
    end = last.began + last.seconds
    faults = sum(entry.outcome != "saved" and end - entry.began - entry.seconds < limits.seconds for entry in attempts)
    return f"{faults} faults within {limits.seconds:.0f} s, the last one: {last.what}" * (faults > limits.restarts)


class HistoryFile:
    """RUN_DIR/supervisor.jsonl: one JSON object a try, of this and all former supervisors."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, entry: Attempt) -> None:
        """Add a try."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
