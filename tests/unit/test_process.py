"""A user error prints one line per host on stderr, with exit code 2."""

import io
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hypermoe_ds.errors import MachineError, UserError
from hypermoe_ds.process import allow_open_files, global_rank, local_rank, one_line_errors

REPOSITORY = Path(__file__).parents[2]
LINE = "error: parallel.expert=3: does not divide 8 experts; use 1, 2, 4 or 8\n"
RAISE = """
from hypermoe_ds import errors, process
{before}
with process.one_line_errors():
    print("up", flush=True)
    raise errors.UserError("parallel.expert=3", "does not divide 8 experts", "use 1, 2, 4 or 8")
"""


def start(code: str, rank: str | None) -> subprocess.Popen[str]:
    """Start a Python process and wait until it prints `up`, just before it raises its error."""
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"}
    if rank is not None:
        environment["LOCAL_RANK"] = rank
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_a_user_error_names_location_problem_and_remedy() -> None:
    assert str(UserError("a.b=1", "is odd", "use 2")) == "a.b=1: is odd; use 2"


def test_a_very_long_part_of_a_message_is_cut_and_its_length_is_given() -> None:
    text = str(UserError(f"train.steps={'9' * 100_000}", "is not valid", "r" * 1500))
    assert text.startswith("train.steps=9999")
    assert f"... (100,012 characters): is not valid; {'r' * 1500}" in text
    assert len(text) < 3100


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_user_error_is_one_line_on_stderr_and_exit_code_2(rank: str | None) -> None:
    process = start(RAISE.format(before=""), rank)
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("", LINE, 2)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "3"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        ({"SLURM_LOCALID": "1"}, 1),
        ({"SLURM_LOCALID": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        ({"SLURM_LOCALID": "0", "LOCAL_RANK": "3"}, 3),
    ],
)
def test_the_local_rank_is_read_from_the_variables_of_every_launcher(
    environment: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert local_rank() == rank


def test_a_machine_error_is_one_line_and_exit_code_76(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise MachineError("rank 3 is lost")
    assert stop.value.code == 76
    assert capsys.readouterr().err == "error: rank 3 is lost\n"


def test_a_message_with_several_lines_is_printed_as_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise UserError("a.yaml", "is bad\n  at line 3", "correct\tit")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.yaml: is bad at line 3; correct it\n"


def test_any_other_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        print(1 // 0)


def test_without_an_error_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with one_line_errors():
        pass
    assert capsys.readouterr() == ("", "")


def test_two_ranks_of_a_host_with_the_same_error_print_one_line() -> None:
    """Rank 1 waits, because the launcher terminates all other ranks as soon as one rank exits."""
    rank1 = start(RAISE.format(before=""), "1")
    with pytest.raises(subprocess.TimeoutExpired):
        rank1.wait(timeout=1)
    rank0 = start(RAISE.format(before=""), "0")
    rank0_error = rank0.communicate(timeout=20)[1]
    rank1.terminate()
    rank1_error = rank1.communicate(timeout=20)[1]
    assert rank0_error + rank1_error == LINE
    assert rank0.returncode == 2


def test_a_rank_prints_its_error_if_no_signal_arrives_in_time() -> None:
    process = start(RAISE.format(before="process._SILENT_SECONDS = 0.2"), "1")
    err = process.communicate(timeout=20)[1]
    assert (err, process.returncode) == (LINE, 2)


def test_sigterm_ends_a_waiting_rank_even_if_the_job_handles_sigterm() -> None:
    """Training handles SIGTERM to save a checkpoint, but a waiting rank has nothing to save."""
    handler = "import signal; signal.signal(signal.SIGTERM, lambda *_: None)"
    process = start(RAISE.format(before=handler), "1")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    terminated = time.monotonic()
    err = process.communicate(timeout=40)[1]
    assert err == ""
    assert time.monotonic() - terminated < 10


class Terminal(io.StringIO):
    """Text stream that pretends to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_an_unexpected_error_keeps_its_traceback_without_a_log() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


def test_an_unexpected_error_prints_one_line_and_logs_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    screen = io.StringIO()
    with pytest.raises(SystemExit) as stop, one_line_errors(screen, Path("run/logs/rank_00003.log")):
        raise ValueError("two\nlines")
    assert stop.value.code == 1
    remedy = "the traceback is at the end of run/logs/rank_00003.log"
    assert screen.getvalue() == f"error: rank 3: ValueError: two lines; {remedy}\n"
    assert "Traceback (most recent call last):" in capsys.readouterr().err


def test_an_error_on_a_terminal_replaces_a_status_line() -> None:
    terminal = Terminal()
    with pytest.raises(SystemExit), one_line_errors(terminal):
        raise UserError("a=1", "is odd", "use 2")
    assert terminal.getvalue() == "\r\x1b[Kerror: a=1: is odd; use 2\n"


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"])
def test_the_global_rank_is_read_from_the_variables_of_every_launcher(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"):
        monkeypatch.delenv(other, raising=False)
    assert global_rank() == 0
    monkeypatch.setenv(name, "5")
    assert global_rank() == 5


@pytest.mark.parametrize(
    ("hard", "ranks", "groups", "enough"),
    [(4096, 800, 4, True), (4096, 1024, 2, True), (4096, 1024, 4, False), (-1, 10**6, 4, True)],
)
def test_the_limit_of_open_files_is_raised_or_reported_as_too_low(
    hard: int, ranks: int, groups: int, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    if enough:
        allow_open_files(ranks, groups)
        assert limits == [(hard, hard)]
        return
    with pytest.raises(MachineError, match=r"^1024 ranks need 4620 open files per process, but the system allows 4096"):
        allow_open_files(ranks, groups)
