"""Tests of how an attempt is classified, and of when the supervisor starts another attempt."""

from dataclasses import replace

import pytest

from hypermoe_ds.cluster.attempts import Attempt, Limits, classify, decide
from hypermoe_ds.resilience.heartbeat import Heartbeat

LIMITS = Limits(restarts=3, seconds=100)
RUNNING = Heartbeat(rank=0, host="node1", process=1, step=7, doing="saving", passed=9, beats=3)
LOST = replace(RUNNING, end="lost")
FAILED = replace(RUNNING, rank=1, host="node2", end="error", error="ValueError: at 0x7f12 of 5")
SAVED = "a signal ended the attempt after a checkpoint"


def attempt(outcome: str, began: float = 0, step: int | None = 7, what: str = "") -> Attempt:
    return Attempt(began, 10, 1, ["node1"], outcome, step, what)


@pytest.mark.parametrize(
    ("exit_code", "heartbeats", "outcome", "what"),
    [
        (0, [replace(RUNNING, end="done")], "done", ""),
        (75, [replace(RUNNING, end="saved")], "saved", SAVED),
        (1, [replace(RUNNING, end="saved")], "saved", SAVED),  # exit code of a launcher that received the signal
        (2, [], "refused", "see the last line of the output"),
        (2, [replace(FAILED, error="UserError: train.max_bad_steps")], "refused", "UserError: train.max_bad_steps"),
        (1, [LOST, FAILED], "error", "ValueError: at 0x7f12 of 5"),
        (76, [LOST, RUNNING], "lost", "rank 1 died"),
        (137, [RUNNING], "lost", "rank 1 died"),
        (
            0,
            [replace(RUNNING, end="saved")],
            "saved",
            SAVED,
        ),  # exit code of the deepspeed command after its launcher was killed
        (1, [replace(FAILED, error="UserError: a")], "refused", "UserError: a"),  # exit code of torchrun
        (1, [], "unmet", "not all ranks had joined"),
    ],
)
def test_an_attempt_is_classified_by_exit_code_and_heartbeats(
    exit_code: int, heartbeats: list[Heartbeat], outcome: str, what: str
) -> None:
    found = classify(5, 9, exit_code, {heartbeat.rank: heartbeat for heartbeat in heartbeats}, "rank 1 died\n")
    assert (found.outcome, found.what, found.seconds) == (outcome, what, 4)
    assert found.step == (7 if heartbeats else None)
    assert found.hosts == sorted({heartbeat.host for heartbeat in heartbeats})


@pytest.mark.parametrize(("outcome", "again"), [("done", False), ("saved", True), ("refused", False), ("lost", True)])
def test_only_outcomes_that_a_restart_can_fix_are_restarted(outcome: str, again: bool) -> None:
    assert decide([attempt(outcome)], LIMITS).again is again


def test_an_error_that_repeats_at_the_same_step_is_not_restarted() -> None:
    first = attempt("error", what="ValueError: at 0x7f12 of 5")
    again = attempt("error", began=20, what="ValueError: at 0x8855 of 6")
    assert decide([first], LIMITS).again
    decision = decide([first, again], LIMITS)
    assert not decision.again
    assert decision.why.startswith("the same error at step 7 as in the attempt before: ValueError")
    assert decide([first, replace(again, step=8)], LIMITS).again
    assert decide([first, replace(again, what="TypeError")], LIMITS).again
    assert decide([first, attempt("saved"), again], LIMITS).again


def test_ranks_killed_twice_at_the_same_step_are_restarted() -> None:
    assert decide([attempt("lost"), attempt("lost", began=20)], LIMITS).again


def test_only_faults_within_the_window_count_towards_the_limit() -> None:
    often = [attempt("lost", began=20 * number) for number in range(4)]
    assert decide(often[:3], LIMITS).again
    assert not decide(often, LIMITS).again
    assert decide([*often[:3], attempt("saved", began=61)], LIMITS).again
    assert decide([attempt("lost", began=200 * number) for number in range(9)], LIMITS).again


def test_a_job_that_never_starts_training_is_given_up() -> None:
    unmet = [attempt("unmet", began=1000 * number, step=None) for number in range(3)]
    assert decide(unmet[:2], LIMITS).again
    assert not decide(unmet, LIMITS).again


def test_one_refusal_after_a_fault_is_restarted_and_two_are_not() -> None:
    lost, refused = attempt("lost"), attempt("refused", began=20)
    assert decide([lost, refused], LIMITS).again
    assert not decide([lost, refused, replace(refused, began=90)], LIMITS).again
