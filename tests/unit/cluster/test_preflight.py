"""Tests of the host checks before a job starts: each fault is reported in one line with its remedy."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from hypermoe_ds.cluster import preflight
from hypermoe_ds.cluster.host_report import HostQuery, HostReport, data_digest, report_host, settings_digest
from hypermoe_ds.cluster.hosts import Host, this_host
from hypermoe_ds.cluster.interconnect import Interconnect
from hypermoe_ds.cluster.preflight import (
    Failure,
    HostAnswer,
    Starter,
    ask_hosts,
    check_hosts,
    check_interconnect,
    fit,
    interconnect_line,
    measure_interconnect,
    table,
)
from hypermoe_ds.errors import UserError
from hypermoe_ds.provenance import source_digest

REPOSITORY = Path(__file__).parents[3]
QUERY = HostQuery("/runs/a", ".preflight-1", "r.yaml", "z.json", (), ())
GOOD = HostReport(
    python="3.11.7", torch="2.13.0", deepspeed="0.19.8", project="abc def", settings="123", data="456",
    devices=["H100"] * 8, memory_gib=100.0, disk_gib=500.0, sees_run_folder=True, address="10.0.0.1", clock=0.0,
)  # fmt: skip


def answer(**changed: object) -> list[HostAnswer]:
    """Return the answers of three hosts; the second answer differs in the given fields."""
    answers = [HostAnswer(Host(f"n{number}", 8), GOOD) for number in range(3)]
    ahead = float(str(changed.pop("clock_ahead", 0.0)))
    answers[1] = HostAnswer(Host("n1", 8), replace(GOOD, **changed), clock_ahead=ahead)  # type: ignore[arg-type]
    return answers


def lines(failures: list[Failure]) -> list[str]:
    return [str(failure.error) for failure in failures]


def test_equal_hosts_with_enough_memory_and_disk_pass() -> None:
    assert check_hosts(answer(clock_ahead=-4.9), QUERY, 499.0) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"python": "3.12.1"}, "n1: python: 3.12.1, but 3.11.7 on most hosts; rebuild the environment there"),
        ({"torch": "2.12.0"}, "n1: torch: 2.12.0, but 2.13.0 on most hosts; run there: bash launch/setup.sh"),
        ({"deepspeed": "missing"}, "n1: deepspeed: missing, but 0.19.8 on most hosts; run there: bash launch/setup.sh"),
        ({"project": "abc xyz"}, "n1: project: abc xyz, but abc def on most hosts; check out the same commit there"),
        (
            {"data": "lacks /d/t.idx"},
            "n1: data: lacks /d/t.idx, but 456 on most hosts; copy the token files and the tokenizer",
        ),
        ({"settings": "9"}, "n1: settings: 9, but 123 on most hosts; copy the same recipe and DeepSpeed JSON there"),
        (
            {"devices": ["A100"] * 8},
            "n1: devices: 8 x A100, but 8 x H100 on most hosts; list only hosts with the same GPUs",
        ),
        ({"memory_gib": 0.9}, "n1: /dev/shm: 0.90 GiB are free, but 8 ranks need 1.00 GiB; enlarge"),
        ({"disk_gib": 3.0}, "n1: run.dir=/runs/a: 3.00 GiB are free, but checkpoints need 40.00 GiB; free"),
        ({"sees_run_folder": False}, "n1: run.dir=/runs/a: is not the same folder as on this machine; choose a"),
        ({"clock_ahead": 7.0}, "n1: clock: differs by +7 s from this machine's clock; set it"),
        ({"clock_ahead": -61.2}, "n1: clock: differs by -61 s from this machine's clock; set it"),
    ],
)
def test_a_host_that_differs_or_lacks_something_is_named_with_a_remedy(changed: dict[str, object], line: str) -> None:
    [failure] = lines(check_hosts(answer(**changed), QUERY, 40.0))
    assert failure.startswith(line)


def test_a_host_with_fewer_gpus_than_slots_has_two_failures() -> None:
    failures = lines(check_hosts(answer(devices=["H100"] * 7), QUERY, 40.0))
    assert [line.partition(";")[0] for line in failures] == [
        "n1: devices: 7 x H100, but 8 x H100 on most hosts",
        "n1: slots=8: the host has 7 GPUs",
    ]


@pytest.mark.parametrize(
    ("field", "value"), [("settings", "unreadable: r.yaml: is gone"), ("data", "lacks /data/train.idx")]
)
def test_files_that_no_host_has_are_reported_once(field: str, value: str) -> None:
    answers = [HostAnswer(Host(f"n{n}", 8), replace(GOOD, **{field: value})) for n in range(3)]  # type: ignore[arg-type]
    [line] = lines(check_hosts(answers, QUERY, 1.0))
    assert line.startswith(f"{field}: {value}; copy the ")


def test_on_cpus_a_host_name_that_resolves_to_loopback_is_reported_unless_it_is_the_only_host() -> None:
    report = replace(GOOD, devices=None, address="127.0.1.1")
    pair = [HostAnswer(Host("n0", 1), report), HostAnswer(Host("n1", 1), replace(report, address="10.0.0.2"))]
    [line] = lines(check_hosts(pair, QUERY, 1.0))
    assert line.startswith("n0: its own name: resolves to 127.0.1.1, which other hosts cannot reach; set GLOO_SOCKET")
    assert check_hosts(pair[:1], QUERY, 1.0) == []


@pytest.mark.parametrize(("reach", "remedy"), [("ssh", "make `ssh n1 true` work"), ("srun", "see `sinfo`")])
def test_a_host_that_does_not_answer_is_reported_with_its_last_line(reach: str, remedy: str) -> None:
    answers = answer()
    answers[1] = HostAnswer(Host("n1", 8, reach), None, "ssh: connect to host n1 port 22: No route to host")
    [line] = lines(check_hosts(answers, QUERY, 1.0))
    assert line.startswith(f"n1: does not answer (ssh: connect to host n1 port 22: No route to host); {remedy}")
    assert [row.split()[0] for row in table(answers).splitlines()] == ["host", "n0", "n1", "n2"]
    assert "no answer" in table(answers).splitlines()[2]


@pytest.mark.parametrize(
    ("exit_code", "remedy"), [(255, "make `ssh -p 7 n1 true` work"), (127, "build the environment")]
)
def test_the_remedy_depends_on_whether_ssh_or_the_environment_failed(
    exit_code: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERMOE_SSH_OPTIONS", "-p 7")
    [line] = lines(check_hosts([HostAnswer(Host("n1", 8), None, "words", exit_code)], QUERY, 1.0))
    assert line.startswith(f"n1: does not answer (words); {remedy}")


HOSTS = [Host(f"n{number}", 8) for number in range(4)]


def interconnect(**slow: float) -> Interconnect:
    pairs = [(a, b, slow.get(f"p{a}{b}", 10.0)) for a in range(4) for b in range(a + 1, 4)]
    return Interconnect(9.0, 5.0, pairs, [])


def test_a_pair_much_slower_than_the_others_is_reported() -> None:
    assert check_interconnect(interconnect(p13=3.4), HOSTS, 0.0) == []
    [line] = lines(check_interconnect(interconnect(p13=3.3), HOSTS, 0.0))
    assert line.startswith("n1 - n3: 3.30 GB/s, but the median over all pairs is 10.00 GB/s; check the cables")


def test_a_pair_slower_than_required_is_reported() -> None:
    [line] = lines(check_interconnect(interconnect(p02=8.0), HOSTS, 9.0))
    assert line.startswith("n0 - n2: 8.00 GB/s, but 9.00 GB/s are required; check")


def test_slow_pairs_are_attributed_to_the_host_that_has_most_of_them() -> None:
    failures = check_interconnect(interconnect(p01=1.0, p12=1.0, p13=1.0), HOSTS, 0.0)
    assert [failure.host for failure in failures] == [HOSTS[1]] * 3
    [alone] = check_interconnect(interconnect(p01=1.0), HOSTS, 0.0)
    assert alone.host == HOSTS[1], "of two hosts, the later one is reported"


def test_a_failure_names_its_host_or_none_if_all_hosts_have_it() -> None:
    [failure] = check_hosts(answer(memory_gib=0.9), QUERY, 40.0)
    assert failure.host == Host("n1", 8)
    unreadable = [HostAnswer(Host(f"n{n}", 8), replace(GOOD, settings="unreadable: r.yaml: is gone")) for n in range(3)]
    assert [failure.host for failure in check_hosts(unreadable, QUERY, 1.0)] == [None]


def test_fit_selects_the_hosts_that_divide_the_batch_and_sets_expert_parallelism() -> None:
    assert fit(HOSTS, 64, 2, 8, 8) == (HOSTS, 8)
    assert fit(HOSTS[:3], 64, 2, 8, 8) == (HOSTS[:2], 8)  # 3 hosts have 24 ranks
    assert fit(HOSTS[:3], 96, 2, 16, 8) == (HOSTS[:3], 8)
    assert fit([Host("n0", 1), Host("n2", 2)], 12, 2, 2, 8).expert == 1
    with pytest.raises(UserError, match=r"^train.global_batch_size=60: cannot be split evenly over the ranks of n0"):
        fit(HOSTS[:2], 60, 2, 8, 8)


def test_a_wrong_result_is_reported_once() -> None:
    assert [
        failure.host for failure in check_interconnect(replace(interconnect(), wrong=["all-to-all"]), HOSTS, 0.0)
    ] == [None]
    [line] = lines(check_interconnect(replace(interconnect(), wrong=["all-reduce", "all-reduce"]), HOSTS, 0.0))
    assert line.startswith("all-reduce: returned a wrong result; ")


def test_the_slowest_pair_is_named() -> None:
    line = interconnect_line(interconnect(p12=7.25), HOSTS, 64)
    assert line == "64 MiB per rank: all-reduce 9.00 GB/s, all-to-all 5.00 GB/s, slowest pair n1 - n2 7.25 GB/s"


# Host reports


@pytest.fixture
def query(tmp_path: Path) -> HostQuery:
    (tmp_path / "r.yaml").write_text("train:\n  steps: 3\n")
    (tmp_path / "z.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".token").touch()
    return HostQuery(
        str(tmp_path / "runs"), ".token", str(tmp_path / "r.yaml"), str(tmp_path / "z.json"), ["a.b=1"], []
    )


def test_the_settings_digest_depends_on_values_and_not_on_formatting(query: HostQuery, tmp_path: Path) -> None:
    def digest(recipe: str, own: str, *overrides: str) -> str:
        (tmp_path / "x.yaml").write_text(recipe)
        (tmp_path / "x.json").write_text(own)
        return settings_digest(str(tmp_path / "x.yaml"), str(tmp_path / "x.json"), overrides)

    usual = digest("a: {b: 1}\nc: {d: 2}\n", '{"x": 1, "y": 2}')
    assert digest("# why\nc:\n  d: 2\na:\n  b: 1\n", '{"y": 2,\n "x": 1}') == usual
    assert digest("c: {d: 2}\n", '{"x": 1, "y": 2}', "a.b=1") == usual
    others = {digest("a: {b: 3}\nc: {d: 2}\n", '{"x": 1, "y": 2}'), digest("a: {b: 1}\nc: {d: 2}\n", '{"x": 1}')}
    assert len(others | {usual}) == 3
    assert digest("a: [", "{}").startswith("unreadable: ")
    assert settings_digest(query.config, str(tmp_path / "none.json"), ()).startswith("unreadable: ")


def test_the_data_digest_depends_on_missing_files_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "t.idx").write_text("12")
    files = [str(tmp_path / name) for name in ("tokenizer", "t.idx")]
    before = data_digest(files)
    (tmp_path / "tokenizer/vocabulary").touch()
    assert data_digest(files) == before
    (tmp_path / "t.idx").write_text("123")
    assert data_digest(files) != before
    (tmp_path / "t.idx").unlink()
    assert data_digest(files) == f"lacks {tmp_path / 't.idx'}"


def test_an_edit_of_the_training_code_changes_the_source_digest(tmp_path: Path) -> None:
    for name in ("hypermoe_ds/a.py", "pretrain/train.py", "tools/b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "tools/b.py").write_text("x = 2\n")
    assert source_digest(tmp_path) == before, "training does not import tools, so they do not change the digest"
    (tmp_path / "hypermoe_ds/a.py").write_text("x = 2\n")
    assert source_digest(tmp_path) != before


def test_report_host_describes_this_machine(query: HostQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    report = report_host(query)
    assert report.python == ".".join(map(str, sys.version_info[:3]))
    assert (report.devices, report.sees_run_folder) == (None, True)
    assert report.disk_gib > 0
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert report_host(query).address == "ib0"
    assert not report_host(replace(query, token=".other")).sees_run_folder
    assert report_host(replace(query, run_dir=f"{query.run_dir}/not/yet")).disk_gib == pytest.approx(
        report.disk_gib, rel=0.1
    )


def starter(folder: Path, **environment: str) -> Starter:
    return Starter({"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", **environment}, folder)


def test_a_host_answers_with_its_report_and_the_clock_difference(query: HostQuery, tmp_path: Path) -> None:
    [answer] = ask_hosts(this_host("2", 0), query, starter(tmp_path))
    assert answer.report is not None, answer.trouble
    assert answer.report.sees_run_folder
    assert abs(answer.clock_ahead) < 5
    assert check_hosts([answer], query, 0.0) == []


def test_a_host_that_cannot_import_the_package_answers_with_the_reason(query: HostQuery, tmp_path: Path) -> None:
    broken = tmp_path / "hypermoe_ds"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('not for this host')")
    [answer] = ask_hosts(this_host("1", 0), query, starter(tmp_path, PYTHONPATH=str(tmp_path)))
    assert answer.report is None
    assert "not for this host" in answer.trouble


def test_a_process_on_a_host_ends_when_its_starter_closes_stdin(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    process = starter(tmp_path, PYTHONPATH=str(tmp_path)).start(*this_host("1", 0), 600, "sleeper")
    assert process.stdin is not None
    assert process.stdout is not None
    sleeper = psutil.Process(int(process.stdout.readline()))
    process.stdin.close()
    assert psutil.wait_procs([sleeper], timeout=30)[1] == []
    assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("text", "line", "remedy"),
    [
        (
            "connect [10.0.0.1]:29500: No route",
            r"port 29500 of n0: the ranks cannot exchange data \(n1: .*No",
            "GLOO_SOCKET",
        ),
        ("address already in use EADDRINUSE", r"MASTER_PORT=29500: is in use on n1", "set another MASTER_PORT"),
    ],
)
def test_a_failed_rendezvous_is_reported_in_one_line_without_waiting_for_other_hosts(
    text: str, line: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Starter, host: Host, seconds: int, module: str, *arguments: str) -> subprocess.Popen[str]:
        script = "exec sleep 600" if host == HOSTS[0] else f"echo 'RuntimeError: {text}'; exit 1"
        return subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(preflight.Starter, "start", fails)
    monkeypatch.setattr(preflight, "_SECONDS_AFTER_FAILURE", 0)
    with pytest.raises(UserError, match=line) as error:
        measure_interconnect(HOSTS[:2], starter(tmp_path), "n0", 29500, 1)
    assert remedy in str(error.value)


def test_a_host_report_is_unchanged_after_conversion_to_json_and_back() -> None:
    again = HostReport(**json.loads(json.dumps(GOOD.__dict__)))
    assert again == GOOD
