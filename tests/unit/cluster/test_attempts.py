"""What a try came to, and whether the next one makes sense."""

from dataclasses import replace

import pytest

from hypermoe_ds.cluster.attempts import Attempt, Limits, classify, decide
from hypermoe_ds.resilience.heartbeat import Heartbeat

LIMITS = Limits(restarts=3, seconds=100)
RUNNING = Heartbeat(rank=0, host="node1", process=1, step=7, doing="saving", passed=9, beats=3)
LOST = replace(RUNNING, end="lost")
FAILED = replace(RUNNING, rank=1, host="node2", end="error", error="ValueError: at 0x7f12 of 5")
SAVED = "a signal ended it after a checkpoint"


def tried(outcome: str, began: float = 0, step: int | None = 7, what: str = "") -> Attempt:
    return Attempt(began, 10, 1, ["node1"], outcome, step, what)


@pytest.mark.parametrize(
    ("exit_code", "heartbeats", "outcome", "what"),
    [
        (0, [replace(RUNNING, end="done")], "done", ""),
        (75, [replace(RUNNING, end="saved")], "saved", SAVED),
        (1, [replace(RUNNING, end="saved")], "saved", SAVED),  # the launcher's code where the signal went to it
        (2, [], "refused", "see its last line"),
        (2, [replace(FAILED, error="UserError: train.max_bad_steps")], "refused", "UserError: train.max_bad_steps"),
        (1, [LOST, FAILED], "error", "ValueError: at 0x7f12 of 5"),
        (76, [LOST, RUNNING], "lost", "rank 1 died"),
        (137, [RUNNING], "lost", "rank 1 died"),
        (0, [replace(RUNNING, end="saved")], "saved", SAVED),  # DeepSpeed's command where its launcher was killed
        (1, [replace(FAILED, error="UserError: a")], "refused", "UserError: a"),  # torchrun's code
        (1, [], "unmet", "it ended before all ranks had joined"),
    ],
)
def test_a_try_is_what_its_ranks_say_of_it(
    exit_code: int, heartbeats: list[Heartbeat], outcome: str, what: str
) -> None:
    found = classify(5, 9, exit_code, {heartbeat.rank: heartbeat for heartbeat in heartbeats}, "rank 1 died\n")
    assert (found.outcome, found.what, found.seconds) == (outcome, what, 4)
    assert found.step == (7 if heartbeats else None)
    assert found.hosts == sorted({heartbeat.host for heartbeat in heartbeats})


@pytest.mark.parametrize(("outcome", "again"), [("done", False), ("saved", True), ("refused", False), ("lost", True)])
def test_only_what_another_start_may_mend_is_started_again(outcome: str, again: bool) -> None:
    assert decide([tried(outcome)], LIMITS).again is again


def test_an_error_that_comes_back_at_the_same_step_is_not_bad_luck() -> None:
    first = tried("error", what="ValueError: at 0x7f12 of 5")
    again = tried("error", began=20, what="ValueError: at 0x8855 of 6")
    assert decide([first], LIMITS).again
    decision = decide([first, again], LIMITS)
    assert not decision.again
    assert decision.why.startswith("the same error at step 7 as in the attempt before: ValueError")
    assert decide([first, replace(again, step=8)], LIMITS).again
    assert decide([first, replace(again, what="TypeError")], LIMITS).again
    assert decide([first, tried("saved"), again], LIMITS).again


def test_ranks_killed_at_the_same_step_are_bad_luck() -> None:
    assert decide([tried("lost"), tried("lost", began=20)], LIMITS).again


def test_faults_count_within_the_window_and_signals_do_not() -> None:
    often = [tried("lost", began=20 * number) for number in range(4)]
    assert decide(often[:3], LIMITS).again
    assert not decide(often, LIMITS).again
    assert decide([*often[:3], tried("saved", began=61)], LIMITS).again
    assert decide([tried("lost", began=200 * number) for number in range(9)], LIMITS).again


def test_a_job_that_never_comes_to_train_is_given_up() -> None:
    unmet = [tried("unmet", began=1000 * number, step=None) for number in range(3)]
    assert decide(unmet[:2], LIMITS).again
    assert not decide(unmet, LIMITS).again


def test_a_refusal_after_a_fault_may_pass_but_not_two() -> None:
    lost, refused = tried("lost"), tried("refused", began=20)
    assert decide([lost, refused], LIMITS).again
    assert not decide([lost, refused, replace(refused, began=90)], LIMITS).again
