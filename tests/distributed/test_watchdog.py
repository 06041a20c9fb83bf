"""If any rank is lost for any reason, the job ends and the failure report names that rank."""

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from watchdog_runs import (
    LAST_GOOD,
    TIMEOUT,
    block_all_ranks,
    lose,
    lose_before_training,
    start_slowly,
    train_to_the_end,
)

from hypermoe_ds.errors import EXIT_FAULT
from hypermoe_ds.resilience.heartbeat import FAILURE_REPORT, read_heartbeats
from tests.helpers.ranks import process_group, ranks_of, run_on_ranks

RANKS = 3
FOUND = {
    "killed": r"died, last seen in step \d, \w",
    "stopped": r"sends no heartbeat, last seen in step \d, \w",
    "hangs": f"hangs, last seen in step {LAST_GOOD}, waiting for data; ",
    "fails": f"ValueError: no such thing, last seen in step {LAST_GOOD + 1}, forward and backward; ",
    "ends": rf"has ended \(done\), last seen in step {LAST_GOOD + 1}, forward and backward; ",
}
CASES = [*((kind, 1) for kind in FOUND), ("killed", 0), pytest.param("stopped", 0, marks=pytest.mark.slow)]


def signal_as_the_launcher(rank: int | None) -> None:
    """Send the signal that DeepSpeed's launcher sends when another rank has failed."""
    process = psutil.Process(rank)
    for signalled in (*process.children(recursive=True), process):
        signalled.terminate()


@pytest.mark.parametrize(("kind", "lost"), CASES)
def test_a_lost_rank_is_reported_with_its_step_and_ends_the_job(kind: str, lost: int, tmp_path: Path) -> None:
    with process_group(RANKS) as environments, ranks_of(environments, lose, tmp_path, kind, lost) as ranks:
        others = [rank for rank in range(RANKS) if rank != lost]
        began = time.monotonic()
        for rank in others:
            ranks[rank].join(60)
        assert [ranks[rank].exitcode for rank in others] == [EXIT_FAULT] * len(others)
        assert time.monotonic() - began < 60
        if kind == "stopped":
            signal_as_the_launcher(ranks[lost].pid)
            ranks[lost].join(30)
            assert ranks[lost].exitcode == -signal.SIGKILL, "a stopped process cannot exit by itself"
    report = (tmp_path / FAILURE_REPORT).read_text()
    assert re.match(rf"rank {lost} \(process \d+ on [\w.-]+\) {FOUND[kind]}", report), report
    # The report also names a rank that waited. Only a lost rank that hangs while loading data may omit this, because it
    # can write the report itself.
    waited = rf"rank \d waited in step {LAST_GOOD + 1}, forward and backward; "
    assert re.search(rf"; ({waited}{'|' * (kind == 'hangs')})stacks of ", report), report
    assert len(re.findall(r"rank \d", report)) <= 2, "the report names no other rank"
    for rank in others:
        stack = (tmp_path / f"stack_{rank:05d}.txt").read_text()
        assert f"in step {LAST_GOOD + 1}" in stack
        assert "watchdog_runs.py" in stack
        assert read_heartbeats(tmp_path)[rank].end == "lost"


def test_progressing_ranks_continue_and_files_of_an_earlier_launch_are_moved(tmp_path: Path) -> None:
    previous = tmp_path / "previous"
    previous.mkdir()
    (previous / "stack_00007.txt").write_text("of a start before")
    for name in (FAILURE_REPORT, "stack_00001.txt", "told_here", "rank_00007.json"):
        (tmp_path / name).write_text("of an earlier start")
    for name in (
        "notes",
        "told_there",
        "rank_00001.json",
        "rank_00000.json.tmp",
    ):  # `notes` is a user's folder; the watchdog writes files with the other names
        (tmp_path / name).mkdir()
        (tmp_path / name / "note").touch()
    assert run_on_ranks(2, train_to_the_end, tmp_path) == [0, 1]
    assert {heartbeat.end for heartbeat in read_heartbeats(tmp_path).values()} == {"done"}
    left = ["notes", "previous", "rank_00000.json", "rank_00001.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert (tmp_path / "notes/note").exists()
    assert sorted(path.name for path in previous.iterdir()) == ["stack_00001.txt", FAILURE_REPORT]
    assert TIMEOUT / 4 * 5 > TIMEOUT


def test_a_slow_launch_of_a_rank_is_tolerated(tmp_path: Path) -> None:
    assert run_on_ranks(2, start_slowly, tmp_path) == [0, 1]
    assert {heartbeat.end for heartbeat in read_heartbeats(tmp_path).values()} == {"done"}
    assert not list(tmp_path.glob("stack_*"))


@pytest.mark.parametrize(("kind", "fate"), [("killed", "died"), ("stopped", "sends no heartbeat")])
def test_a_rank_lost_before_training_ends_the_job(kind: str, fate: str, tmp_path: Path) -> None:
    with process_group(2) as environments, ranks_of(environments, lose_before_training, tmp_path, kind) as ranks:
        ranks[0].join(60)
        assert ranks[0].exitcode == EXIT_FAULT
    assert re.match(
        rf"rank 1 \(process \d+ on [\w.-]+\) {fate}, last seen in ", (tmp_path / FAILURE_REPORT).read_text()
    )


@pytest.mark.parametrize("hosts", [["a", "a", "a"], ["a", "b", "b"]])
def test_if_no_rank_is_behind_each_host_prints_one_report_that_may_suggest_the_network(
    hosts: list[str], tmp_path: Path
) -> None:
    folder, consoles = tmp_path / "watch", tmp_path / "consoles"
    consoles.mkdir()
    with (
        process_group(RANKS) as environments,
        ranks_of(environments, block_all_ranks, folder, consoles, hosts) as ranks,
    ):
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [EXIT_FAULT] * RANKS
    report = (folder / FAILURE_REPORT).read_text()
    remedy = "check the network between a, b; " if "b" in hosts else ""
    assert re.match(
        f"no rank has made progress for 2 s, and no rank is behind the others; {remedy}(rank|stacks)", report
    ), report
    lines = {host: "".join((consoles / str(n)).read_text() for n in range(RANKS) if hosts[n] == host) for host in hosts}
    assert lines == dict.fromkeys(hosts, f"error: {report}")
