"""After any fault during a save, older checkpoints remain and the run resumes from the newest intact one."""

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_runs import (
    report_failed_save,
    save_after_the_folder_was_replaced,
    save_in_bad_steps,
    save_not_finite,
    save_on_full_disk,
    save_steps,
    save_without_end,
)

from hypermoe_ds.checkpoint.directory import latest_step, saved_steps, step_name
from hypermoe_ds.checkpoint.manifest import MANIFEST
from hypermoe_ds.checkpoint.shards import CheckpointReader, shard_name
from tests.helpers.ranks import process_group, ranks_of, run_on_ranks

RANKS = 2
KILLS = 20


def newest(folder: Path) -> int:
    """Verify the checkpoint that `latest` names and return its step, or 0 if there is no checkpoint."""
    step = latest_step(folder / "checkpoints")
    if step is None:
        return 0
    with CheckpointReader(folder / "checkpoints" / step_name(step), "full") as reader:
        for kind in reader.manifest.kinds:
            assert reader.read("weight", kind).unique().tolist() == [step]
        assert reader.manifest.state["run"] == {"step": step}
    return step


def last_saved(folder: Path) -> int:
    """Return the last step whose save completed on some rank."""
    notes = [path.read_text().split() for path in folder.glob("saved_by_*")]
    return max((int(steps[-1]) for steps in notes if steps), default=0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killing_ranks_at_random_times_during_saves_loses_no_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    moments = random.Random(int(asynchronous))
    before = 0
    for _ in range(KILLS // 2):
        with (
            process_group(RANKS) as environments,
            ranks_of(environments, save_without_end, tmp_path, asynchronous) as ranks,
        ):
            while last_saved(tmp_path) < before + 2:
                assert all(rank.is_alive() for rank in ranks)
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.1))  # the delay usually ends during a save
            ranks[moments.randrange(RANKS)].kill()
        assert newest(tmp_path) >= last_saved(tmp_path)
        before = newest(tmp_path)
    assert before >= KILLS // 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("file", [MANIFEST, shard_name(0), shard_name(1)])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_is_used(
    tmp_path: Path, file: str, damage: Any
) -> None:
    config = {"keep_last": 3}
    run_on_ranks(RANKS, save_steps, tmp_path, 3, config)
    damage(tmp_path / "checkpoints" / step_name(3) / file)
    (resumed, error, messages), _ = run_on_ranks(RANKS, save_steps, tmp_path, 4, config)
    assert (resumed, error) == (2, None)
    [warning] = [line for line in messages if line.startswith("warning: ")]
    assert f"{step_name(3)}/{file}" in warning
    assert warning.endswith(f"(renamed to {tmp_path}/checkpoints/{step_name(3)}.damaged)")
    assert "using the checkpoint of step 2 instead" in messages
    assert newest(tmp_path) == 4
    assert saved_steps(tmp_path / "checkpoints") == [2, 3, 4]


def no_header(path: Path) -> None:
    path.write_bytes(bytes(64) + path.read_bytes()[64:])


def test_without_hashes_a_damaged_header_is_reported_and_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    config = {"verify": "sizes", "keep_last": 3}
    run_on_ranks(RANKS, save_steps, tmp_path, 3, config)
    no_header(tmp_path / "checkpoints" / step_name(3) / shard_name(1))
    (resumed, error, messages), _ = run_on_ranks(RANKS, save_steps, tmp_path, 2, config)
    assert (resumed, error) == (2, None)
    [warning] = [line for line in messages if line.startswith("warning: ")]
    assert f"{step_name(3)}/{shard_name(1)}: has a damaged header (" in warning


@pytest.mark.parametrize("latest", [b"", b"\xff\0garbage", b"step_00000009\n"])
def test_with_an_invalid_latest_file_the_newest_intact_checkpoint_is_used_and_reported(
    tmp_path: Path, latest: bytes
) -> None:
    run_on_ranks(RANKS, save_steps, tmp_path, 3, {"keep_last": 3})
    (tmp_path / "checkpoints/latest").write_bytes(latest)
    cut(tmp_path / "checkpoints" / step_name(3) / shard_name(1))
    (resumed, error, messages), _ = run_on_ranks(RANKS, save_steps, tmp_path, 2, {})
    assert (resumed, error) == (2, None)
    first, second = [line for line in messages if line.startswith("warning: ")]
    file = f"{tmp_path}/checkpoints/latest"
    assert first == f"warning: {file}: does not name an existing checkpoint; using the newest, step_00000003"
    assert f"{step_name(3)}/{shard_name(1)}" in second
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_with_nan_is_never_saved_and_no_good_checkpoint_is_deleted(tmp_path: Path, asynchronous: bool) -> None:
    for raised, good in run_on_ranks(RANKS, save_not_finite, tmp_path, asynchronous):
        assert good == step_name(2)
        assert len(raised) == (1 if asynchronous else 3), "a failed background save is logged, and the next save raises"
        for error in raised:
            assert "is not saved: weight/weight has NaN or Inf on rank 1; resume from" in error
    assert saved_steps(tmp_path / "checkpoints") == [2]


def test_the_last_good_checkpoint_is_intact_and_older_than_the_bad_steps(tmp_path: Path) -> None:
    for found in run_on_ranks(RANKS, save_in_bad_steps, tmp_path, flip):
        assert found == [step_name(3), step_name(2), step_name(1), None]


def test_the_replacement_of_a_damaged_checkpoint_becomes_the_latest(tmp_path: Path) -> None:
    run_on_ranks(RANKS, save_steps, tmp_path, 3, {"keep_last": 3})
    cut(tmp_path / "checkpoints" / step_name(3) / shard_name(0))
    assert [resumed for resumed, *_ in run_on_ranks(RANKS, save_steps, tmp_path, 0, {})] == [2, 2]
    assert newest(tmp_path) == 2


def test_a_run_without_an_intact_checkpoint_stops(tmp_path: Path) -> None:
    run_on_ranks(RANKS, save_steps, tmp_path, 2, {})
    for step in (1, 2):
        cut(tmp_path / "checkpoints" / step_name(step) / shard_name(1))
    for _, error, _ in run_on_ranks(RANKS, save_steps, tmp_path, 3, {}):
        assert error is not None
        assert "has no good checkpoint" in error
        assert f"{step_name(2)}/{shard_name(1)}" in error
        assert error.endswith("restore one or choose another run.dir")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run([mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_fails_the_save_on_all_ranks_and_keeps_saved_checkpoints(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"0" * 7 * 2**20)  # leaves room for one checkpoint of 4.6 MiB, not for two
    first, second = run_on_ranks(RANKS, save_on_full_disk, small_disk)
    assert first == second
    [error] = first
    assert f"checkpoints: cannot be written on {socket.gethostname()} (" in error
    assert "No space left" in error or "StorageFull" in error
    assert saved_steps(small_disk / "checkpoints") == [1, 20]
    assert newest(small_disk) == 20
    assert not list((small_disk / "checkpoints").glob(".step*"))


def test_a_read_only_folder_is_reported_in_one_line(small_disk: Path) -> None:
    run_on_ranks(RANKS, save_steps, small_disk, 1, {})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    results = run_on_ranks(RANKS, save_steps, small_disk, 2, {"asynchronous": False})
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    for resumed, error, _ in results:
        assert resumed == 1
        assert error is not None
        assert error.endswith("cannot be written; choose another run.dir")
    assert newest(small_disk) == 1


def test_after_a_failed_background_save_the_next_save_blocks_training(
    tmp_path: Path,
) -> None:
    (_, error, messages), _ = run_on_ranks(RANKS, save_steps, tmp_path, 3, {"keep_last": 9}, 2)
    assert error is None
    assert [line for line in messages if line.startswith("error: ")] == [
        f"error: {tmp_path}/checkpoints: cannot be written on {socket.gethostname()} (No space left on device); "
        "fix the cause and start again"
    ]
    assert newest(tmp_path) == 3
    assert saved_steps(tmp_path / "checkpoints") == [1, 3]
    (tmp_path / "other").mkdir()
    assert run_on_ranks(RANKS, report_failed_save, tmp_path / "other") == [(True, False)] * RANKS


def test_a_replaced_run_folder_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    run.mkdir()
    first, second = run_on_ranks(RANKS, save_after_the_folder_was_replaced, run, aside)
    assert first == second
    [error] = first
    assert error.startswith(f"run.dir={run}: is no longer the folder in which the run began, on ")
    assert list(run.iterdir()) == []
    assert newest(aside) == 1
