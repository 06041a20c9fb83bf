"""Finding and keeping checkpoints, by what lies in the folder."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

from hypermoe_ds.checkpoint import manager
from hypermoe_ds.checkpoint.manager import (
    CheckpointConfig,
    CheckpointManager,
    find_checkpoint,
    latest_step,
    saved_steps,
    step_name,
)
from hypermoe_ds.errors import UserError

PARAMETERS = 1000


def make(folder: Path, *steps: int, latest: str | None = None) -> Path:
    for step in steps:
        (folder / step_name(step)).mkdir(parents=True)
    if latest is not None:
        (folder / "latest").write_text(latest)
    return folder


class Engine:
    """Writes an empty folder, as whole as the manager can tell."""

    device = torch.device("cpu")
    module = torch.nn.Linear(2, 2)

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any]) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / "latest").write_text(tag)

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, str]]:
        return "path", {"loaded": f"{folder}/{tag}"}


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    return


def manager_of(folder: Path, **config: Any) -> CheckpointManager:
    return CheckpointManager(Engine(), folder, CheckpointConfig(**config), PARAMETERS)


def test_folders_sort_as_their_steps_do(tmp_path: Path) -> None:
    steps = [1, 9, 10, 99, 12345678]
    assert sorted(map(step_name, steps)) == [step_name(step) for step in steps]
    assert saved_steps(make(tmp_path, *reversed(steps))) == steps


def test_only_folders_named_by_a_step_count(tmp_path: Path) -> None:
    make(tmp_path, 5)
    for name in ("step_00000007.partial", "step_", "universal_1", "step_x"):
        (tmp_path / name).mkdir()
    assert saved_steps(tmp_path) == [5]
    assert saved_steps(tmp_path / "none") == []


def test_the_newest_is_the_one_that_latest_names_and_not_the_highest(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    make(tmp_path, 10, 20, latest="step_00000010\n")
    assert latest_step(tmp_path) == 10
    assert find_checkpoint(tmp_path, None) == tmp_path / "step_00000010"
    assert find_checkpoint(tmp_path, 20) == tmp_path / "step_00000020"


@pytest.mark.parametrize("latest", ["step_00000030", "step_10", "", "global_step10", "../step_00000010"])
def test_a_latest_that_names_nothing_is_refused(tmp_path: Path, latest: str) -> None:
    make(tmp_path, 10, latest=latest)
    with pytest.raises(UserError, match=r"latest: names no checkpoint beside it; write the name of a step_ folder"):
        latest_step(tmp_path)


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, latest="step_00000020")
    with pytest.raises(UserError, match=r"step_00000015: does not exist; choose a saved step: 10, 20$"):
        find_checkpoint(tmp_path, 15)
    with pytest.raises(UserError, match=r"choose a saved step: none$"):
        find_checkpoint(tmp_path / "none", 15)
    with pytest.raises(UserError, match="none: holds no checkpoint; train first"):
        find_checkpoint(tmp_path / "none", None)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_one_cut_off_before_a_resume_goes(tmp_path: Path, keep: int) -> None:
    make(tmp_path, 10, 20, 30, 99)
    manager_of(tmp_path, keep_last=keep).save(40, {})
    assert saved_steps(tmp_path) == [10, 20, 30, 40][-keep:]
    assert latest_step(tmp_path) == 40


def test_checkpoints_are_due_at_every_interval() -> None:
    checkpoints = manager_of(Path("none"), interval=3)
    assert [step for step in range(1, 10) if checkpoints.is_due(step)] == [3, 6, 9]


def test_resuming_loads_the_newest_or_nothing(tmp_path: Path) -> None:
    assert manager_of(tmp_path).resume() is None
    assert manager_of(tmp_path, resume="none").resume() is None
    make(tmp_path, 10, 20, latest="step_00000010")
    assert manager_of(tmp_path).resume() == {"loaded": f"{tmp_path}/step_00000010"}
    with pytest.raises(UserError, match=r"holds checkpoints; choose another run.dir or set checkpoint.resume=auto$"):
        manager_of(tmp_path, resume="none").resume()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 16), (torch.bfloat16, 14)])
def test_room_is_asked_for_weights_and_optimizer_and_nothing_is_written_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bytes_each: int
) -> None:
    monkeypatch.setattr(Engine, "module", torch.nn.Linear(2, 2, dtype=dtype))
    needed = PARAMETERS * bytes_each
    folder = tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    manager_of(folder).check_room()
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"checkpoints: 0.00 GiB are free .*; free some disk or choose another run.dir"):
        manager_of(folder).save(1, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_rank")
def test_a_run_folder_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run.dir=.*file/run: cannot be written to; choose another run.dir$"):
        manager_of(tmp_path / "file" / "run" / "checkpoints").check_room()
