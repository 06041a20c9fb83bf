"""A rank that is lost ends the whole job and is named, whichever it is and however it was lost."""

import re
import time
from pathlib import Path

import pytest
from watchdog_runs import LAST_GOOD, TIMEOUT, come_to_an_end, lose

from hypermoe_ds.errors import EXIT_FAULT
from hypermoe_ds.monitor.signs import VERDICT, read_signs
from tests.helpers.ranks import process_group, ranks_of, run_on_ranks

RANKS = 3
FOUND = {
    "killed": r"died, last heard of in step \d, \w",
    "stopped": r"gives no sign of life, last heard of in step \d, \w",
    "hangs": f"hangs, last heard of in step {LAST_GOOD}, waiting for data; ",
    "fails": f"ValueError: no such thing, last heard of in step {LAST_GOOD + 1}, forward and backward; ",
}
CASES = [*((kind, 1) for kind in FOUND), ("killed", 0), pytest.param("stopped", 0, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "lost"), CASES)
def test_a_lost_rank_is_named_with_its_step_and_ends_all(kind: str, lost: int, tmp_path: Path) -> None:
    with process_group(RANKS) as environments, ranks_of(environments, lose, tmp_path, kind, lost) as ranks:
        others = [rank for rank in range(RANKS) if rank != lost]
        began = time.monotonic()
        for rank in others:
            ranks[rank].join(60)
        assert [ranks[rank].exitcode for rank in others] == [EXIT_FAULT] * len(others)
        assert time.monotonic() - began < 60
    told = (tmp_path / VERDICT).read_text()
    assert re.match(rf"rank {lost} \(process \d+ on [\w.-]+\) {FOUND[kind]}", told), told
    # Any rank may speak, the one that hangs for data too.
    place = rf"step ({LAST_GOOD}, waiting for data|{LAST_GOOD + 1}, forward and backward)"
    assert re.search(rf"; rank \d waited in {place}; stacks of ", told), told
    assert len(re.findall(r"rank \d", told)) == 2, "nobody else is blamed"
    for rank in others:
        stack = (tmp_path / f"stack_{rank:05d}.txt").read_text()
        assert f"in step {LAST_GOOD + 1}" in stack
        assert "watchdog_runs.py" in stack
        assert read_signs(tmp_path)[rank].end == "lost"


def test_steps_that_come_on_are_left_alone_and_what_an_earlier_start_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / VERDICT).write_text("of an earlier start")
    assert run_on_ranks(2, come_to_an_end, tmp_path) == [0, 1]
    assert {sign.end for sign in read_signs(tmp_path).values()} == {"done"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_00000.json", "rank_00001.json"]
    assert TIMEOUT / 4 * 5 > TIMEOUT
