"""The checkpoint directory finds, publishes and removes checkpoints."""

import errno
from pathlib import Path

import pytest

from hypermoe_ds.checkpoint import directory
from hypermoe_ds.checkpoint.directory import find_checkpoint, latest_step, saved_steps, step_name
from hypermoe_ds.errors import UserError


def make(folder: Path, *steps: int, latest: str | None = None) -> Path:
    for step in steps:
        (folder / step_name(step)).mkdir(parents=True)
        (folder / step_name(step) / "content").write_text(str(step))
    if latest is not None:
        (folder / "latest").write_text(latest)
    return folder


def test_folder_names_sort_by_step(tmp_path: Path) -> None:
    steps = [1, 9, 10, 99, 12345678]
    assert sorted(map(step_name, steps)) == [step_name(step) for step in steps]
    assert saved_steps(make(tmp_path, *reversed(steps))) == steps


def test_only_folders_named_by_a_step_are_checkpoints(tmp_path: Path) -> None:
    make(tmp_path, 5)
    for name in (".step_00000007.partial", "step_00000008.damaged", "step_", "step_x", "step_6"):
        (tmp_path / name).mkdir()
    (tmp_path / step_name(9)).write_text("a file")
    (tmp_path / step_name(10)).symlink_to("nowhere")
    assert saved_steps(tmp_path) == [5]
    assert saved_steps(tmp_path / "none") == []


def test_the_newest_checkpoint_is_the_one_that_latest_names(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    make(tmp_path, 10, 20, latest="step_00000010\n")
    assert latest_step(tmp_path) == 10
    assert find_checkpoint(tmp_path, None) == tmp_path / "step_00000010"
    assert find_checkpoint(tmp_path, 20) == tmp_path / "step_00000020"


def test_checkpoints_without_latest_do_not_start_a_new_run(tmp_path: Path) -> None:
    assert latest_step(make(tmp_path, 10, 20)) == 20


@pytest.mark.parametrize(
    "latest", [b"step_00000030", b"step_10", b"", b"global_step10", b"../step_00000010", b"\xff\xfe\0", b"x" * 10**6]
)
def test_an_invalid_latest_is_reported_and_the_newest_step_is_used(
    tmp_path: Path, latest: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, 10, 20)
    (tmp_path / "latest").write_bytes(latest)
    assert latest_step(tmp_path) == 20
    [record] = caplog.records
    assert record.getMessage() == (
        f"warning: {tmp_path}/latest: does not name an existing checkpoint; using the newest, step_00000020"
    )


def test_a_latest_that_is_a_folder_is_reported(tmp_path: Path) -> None:
    make(tmp_path, 10)
    (tmp_path / "latest").mkdir()
    assert latest_step(tmp_path) == 10


def test_latest_without_checkpoints_does_not_start_a_new_run(tmp_path: Path) -> None:
    make(tmp_path, latest="step_00000010")
    with pytest.raises(UserError, match="latest: exists, but there is no checkpoint; restore a checkpoint, or remove"):
        latest_step(tmp_path)


def test_a_missing_step_is_refused_with_a_list_of_saved_steps(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, latest="step_00000020")
    with pytest.raises(UserError, match=r"step_00000015: does not exist; choose a saved step: 10, 20$"):
        find_checkpoint(tmp_path, 15)
    with pytest.raises(UserError, match=r"choose a saved step: none$"):
        find_checkpoint(tmp_path / "none", 15)
    with pytest.raises(UserError, match="none: has no checkpoint; train first"):
        find_checkpoint(tmp_path / "none", None)


def test_a_checkpoint_gets_its_final_name_when_it_is_published(tmp_path: Path) -> None:
    make(tmp_path, 10, latest="step_00000010")
    directory.begin(tmp_path, 20)
    (directory.partial_folder(tmp_path, 20) / "content").write_text("whole")
    assert saved_steps(tmp_path) == [10]
    assert latest_step(tmp_path) == 10
    directory.publish(tmp_path, 20)
    assert latest_step(tmp_path) == 20
    assert (tmp_path / step_name(20) / "content").read_text() == "whole"
    assert not directory.partial_folder(tmp_path, 20).exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, 10, latest="step_00000010")
    directory.begin(tmp_path, 10)
    (directory.partial_folder(tmp_path, 10) / "content").write_text("again")
    directory.publish(tmp_path, 10)
    assert (tmp_path / step_name(10) / "content").read_text() == "again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", step_name(10)]


def test_an_interrupted_save_is_removed_before_the_next_save(tmp_path: Path) -> None:
    for step in (10, 20):
        directory.begin(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == [".step_00000020.partial"]


def test_unrelated_files_are_kept_and_unfinished_files_or_links_removed(tmp_path: Path) -> None:
    others = tmp_path / "others"
    make(others, 10)
    for name in (".step_notes", ".step_00000010.partial", ".step_00000020.removed"):
        (tmp_path / name).touch()
    (tmp_path / ".step_00000030.removed").symlink_to(others)
    directory.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_notes", "others"]
    assert saved_steps(others) == [10]


def test_only_the_link_of_a_linked_old_checkpoint_is_removed(tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", 10)
    checkpoints = make(tmp_path / "checkpoints", 20, 30)
    (checkpoints / step_name(10)).symlink_to(archive / step_name(10))
    assert saved_steps(checkpoints) == [10, 20, 30]
    directory.remove_old(checkpoints, 30, 2, None)
    assert sorted(path.name for path in checkpoints.iterdir()) == [step_name(20), step_name(30)]
    assert (archive / step_name(10) / "content").read_text() == "10"


def test_a_checkpoint_that_cannot_be_deleted_is_reported_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, _: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    make(tmp_path, 10, 20, 30)
    monkeypatch.setattr(Path, "rename", refuse)
    directory.remove_old(tmp_path, 30, 1, None)
    assert saved_steps(tmp_path) == [10, 20, 30]
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: {tmp_path / step_name(step)}: cannot be removed (Permission denied); remove it by hand"
        for step in (10, 20)
    ]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, None, [50]),
        (2, None, [40, 50]),
        (9, None, [10, 20, 30, 40, 50]),
        (1, 20, [20, 40, 50]),
        (2, 30, [30, 40, 50]),
    ],
)
def test_the_last_checkpoints_and_multiples_of_keep_every_are_kept(
    tmp_path: Path, keep_last: int, keep_every: int | None, kept: list[int]
) -> None:
    make(tmp_path, 10, 20, 30, 40, 50, 90)
    directory.remove_old(tmp_path, 50, keep_last, keep_every)
    assert saved_steps(tmp_path) == [*kept, 90], "one of a later step is of a run taken back: it is not touched"
    assert all(path.name.startswith("step_") for path in tmp_path.iterdir())


def test_a_damaged_checkpoint_is_renamed_and_does_not_block_a_new_one(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        make(tmp_path, 10)
        names.append(directory.set_aside(tmp_path, 10).name)
    assert names == ["step_00000010.damaged", "step_00000010.damaged2", "step_00000010.damaged3"]
    assert saved_steps(tmp_path) == []


@pytest.mark.parametrize("latest", [None, "step_00000010"])
def test_only_damaged_checkpoints_do_not_start_a_new_run(tmp_path: Path, latest: str | None) -> None:
    make(tmp_path, 10, latest=latest)
    directory.set_aside(tmp_path, 10)
    with pytest.raises(UserError, match=r"has only damaged checkpoints \(step_00000010.damaged\); restore one, or"):
        latest_step(tmp_path)
    make(tmp_path, 5, latest="step_00000005")
    assert latest_step(tmp_path) == 5
