"""Preprocessed files contain exactly the tokens of the documents, for any number of processes."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypermoe_ds.data import encoding, readers, token_shards
from hypermoe_ds.data import preprocess as preprocess_module
from hypermoe_ds.data.encoding import Encoder
from hypermoe_ds.data.megatron import IndexedDataset
from hypermoe_ds.data.mpi import preprocess_on_ranks
from hypermoe_ds.data.preprocess import Job, preprocess
from hypermoe_ds.data.readers import ReadOptions
from hypermoe_ds.data.token_files import content_digest, inspect, read_metadata
from hypermoe_ds.data.tokenizer import load_tokenizer
from hypermoe_ds.errors import UserError
from tests.helpers.corpus import TokenisedCorpus, write_jsonl, write_token_files

SUFFIXES = (".bin", ".idx", ".json")
STRICT = ReadOptions(strict=True)


def contents(prefix: str) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


def job(corpus: TokenisedCorpus, inputs: list[Path], output: Path, **options: Any) -> Job:
    return Job([str(path) for path in inputs], str(corpus.tokenizer), str(output), **options)


def test_files_contain_the_tokens_of_each_document_and_an_end_token(corpus: TokenisedCorpus) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer)
    texts = [path.read_text(encoding="utf-8") for path in corpus.texts[:-4]]
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    stream = np.fromfile(f"{corpus.train}.bin", dtype=np.uint16)
    assert stream.tolist() == [token for document in expected for token in document]
    dataset = IndexedDataset(corpus.train)
    assert [dataset[number].tolist() for number in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == list(range(len(texts) + 1))
    assert tokenizer.decode(dataset[0][:-1]) == texts[0]
    metadata = read_metadata(corpus.train)
    assert metadata is not None
    sha256 = hashlib.sha256((corpus.tokenizer / "tokenizer.model").read_bytes()).hexdigest()
    assert (metadata.documents, metadata.tokens) == (len(texts), len(stream))
    assert metadata.text_bytes == sum(len(text.encode()) for text in texts)
    assert (metadata.vocab_size, metadata.eos_id) == (1000, tokenizer.eos_token_id)
    assert (metadata.tokenizer_file, metadata.tokenizer_sha256) == ("tokenizer.model", sha256)
    assert inspect(corpus.train).tokens == len(stream)


def test_the_text_of_an_end_token_does_not_end_a_document(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a </s> b")
    preprocess(job(corpus, [tmp_path / "a.txt"], tmp_path / "out"))
    tokens = np.fromfile(tmp_path / "out.bin", dtype=np.uint16).tolist()
    assert tokens.count(read_metadata(str(tmp_path / "out")).eos_id) == 1  # type: ignore[union-attr]


def test_a_large_vocabulary_is_written_as_int32(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    vocabulary = {f"w{number}": number for number in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.txt").write_text("w69999 w5")
    preprocess(Job([str(tmp_path / "a.txt")], str(tmp_path), str(tmp_path / "out")))
    assert np.fromfile(tmp_path / "out.bin", dtype=np.int32).tolist() == [69999, 5, 1]
    assert inspect(str(tmp_path / "out")).largest_token() == 69999
    assert Encoder(str(tmp_path)).dtype is np.int32


def test_the_files_do_not_depend_on_workers_and_shards(
    corpus: TokenisedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line for path in corpus.texts[:6] for line in path.read_text(encoding="utf-8").split("\n\n")]
    packed = tmp_path / "lines.jsonl.gz"
    packed.write_bytes(gzip.compress(write_jsonl(tmp_path / "lines.jsonl", lines).read_bytes()))
    inputs = [*corpus.texts[6:8], packed, corpus.texts[8]]
    preprocess(job(corpus, inputs, tmp_path / "1"))
    monkeypatch.setattr(token_shards, "_SMALLEST_SHARD", 10_000)
    preprocess(job(corpus, inputs, tmp_path / "2", workers=2))
    assert contents(f"{tmp_path}/1") == contents(f"{tmp_path}/2")
    assert read_metadata(f"{tmp_path}/1").documents == sum(bool(line.strip()) for line in lines) + 3  # type: ignore[union-attr]


def test_existing_files_are_kept_without_overwrite(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    first, second = ([path] for path in corpus.texts[:2])
    preprocess(job(corpus, first, tmp_path / "out"))
    before = contents(f"{tmp_path}/out")
    with pytest.raises(UserError, match="exists already"):
        preprocess(job(corpus, second, tmp_path / "out"))
    assert contents(f"{tmp_path}/out") == before
    (tmp_path / "bad.jsonl").write_text("no json")
    with pytest.raises(UserError, match="no JSON object"):
        preprocess(job(corpus, [*second, tmp_path / "bad.jsonl"], tmp_path / "out", overwrite=True, options=STRICT))
    assert contents(f"{tmp_path}/out") == before
    preprocess(job(corpus, second, tmp_path / "out", overwrite=True))
    preprocess(job(corpus, second, tmp_path / "new"))
    assert contents(f"{tmp_path}/out") == contents(f"{tmp_path}/new") != before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_no_files(corpus: TokenisedCorpus, tmp_path: Path, workers: int) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    inputs = [*corpus.texts[:3], tmp_path / "bad.txt"]
    with pytest.raises(UserError, match=r"bad\.txt: no UTF-8 text"):
        preprocess(job(corpus, inputs, tmp_path / "new" / "folder" / "out", options=STRICT, workers=workers))
    assert os.listdir(tmp_path) == ["bad.txt"]


def test_a_killed_worker_is_reported(corpus: TokenisedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shards, "_SMALLEST_SHARD", 10_000)
    monkeypatch.setattr(preprocess_module, "write_shard", lambda *_: os._exit(1))
    with pytest.raises(UserError, match="workers=2: a worker process died"):
        preprocess(job(corpus, corpus.texts[:3], tmp_path / "out", workers=2))
    assert os.listdir(tmp_path) == []


def killed_job(work: Job, shards: int) -> None:
    """Run a job in a child process, which is killed when `shards` shards are finished."""
    pid = os.fork()
    if pid == 0:
        write, written = token_shards.write_shard, []

        def write_or_die(*args: Any) -> None:
            if len(written) == shards:
                os.kill(os.getppid() if work.workers > 1 else os.getpid(), signal.SIGKILL)
                signal.pause()
            write(*args)
            written.append(1)

        preprocess_module.write_shard = write_or_die  # type: ignore[assignment]
        preprocess(work)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_job_continues_and_ends_with_the_same_files(
    corpus: TokenisedCorpus,
    tmp_path: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(token_shards, "_SMALLEST_SHARD", 10_000)
    preprocess(job(corpus, corpus.texts, tmp_path / "alone"))
    killed_job(job(corpus, corpus.texts, tmp_path / "out", workers=workers), 2)
    partial = tmp_path / ".out.partial"
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("shard-*.json")}
    assert len(finished) >= 2
    preprocess(job(corpus, corpus.texts, tmp_path / "out"))
    assert f"continuing: {len(finished)} of " in capfd.readouterr().err
    assert contents(f"{tmp_path}/out") == contents(f"{tmp_path}/alone")
    assert not partial.exists()


def test_an_interrupted_join_continues(
    corpus: TokenisedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_shards, "_SMALLEST_SHARD", 10_000)
    preprocess(job(corpus, corpus.texts, tmp_path / "alone"))
    unlink, removed = Path.unlink, []

    def interrupt(path: Path, **options: bool) -> None:
        if path.name.startswith("shard"):
            removed.append(path)
            if len(removed) == 3:
                raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        preprocess(job(corpus, corpus.texts, tmp_path / "out"))
    preprocess(job(corpus, corpus.texts, tmp_path / "out"))
    assert contents(f"{tmp_path}/out") == contents(f"{tmp_path}/alone")


def test_a_different_job_does_not_use_the_shards_of_an_unfinished_job(
    corpus: TokenisedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(token_shards, "_SMALLEST_SHARD", 10_000)
    killed_job(job(corpus, corpus.texts, tmp_path / "out"), 2)
    preprocess(job(corpus, corpus.texts[1:4], tmp_path / "out"))
    assert "removed the unfinished files of a different job" in capfd.readouterr().err
    preprocess(job(corpus, corpus.texts[1:4], tmp_path / "alone"))
    assert contents(f"{tmp_path}/out") == contents(f"{tmp_path}/alone")


def test_two_jobs_cannot_write_the_same_output(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    lock = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True)"
    command = [sys.executable, "-c", f"{lock}; sys.stdin.read()", str(tmp_path / ".out.partial" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="out: is being written by another job"):
            preprocess(job(corpus, corpus.texts[:1], tmp_path / "out"))
        other.communicate(b"")
    preprocess(job(corpus, corpus.texts[:1], tmp_path / "out"))


def test_rejections_are_listed_and_too_many_fail_the_job(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    lines = ['{"text": "good"}'] * 98 + ["no json", "{}"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    work = job(corpus, [tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(UserError, match=r"2\.0% of them were rejected \(limit 1\.0%\): 1 with no JSON object"):
        preprocess(work)
    listed = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert [(each["line"], each["reason"]) for each in listed] == [
        (99, "no JSON object"),
        (100, "no text in the field"),
    ]
    assert {each["file"] for each in listed} == {str(tmp_path / "a.jsonl")}
    assert not (tmp_path / "out.bin").exists()
    assert "rejected: 1 with no JSON object" in preprocess(replace(work, max_rejected=0.02))
    assert len((tmp_path / "out.rejected.jsonl").read_text().splitlines()) == 2


def test_a_file_that_disappears_is_rejected_or_stops_a_strict_job(
    corpus: TokenisedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = preprocess_module.make_plan

    def lose(work: Job) -> Any:
        made = plan(work)
        (tmp_path / "b.txt").unlink()
        return made

    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("some text")
    monkeypatch.setattr(preprocess_module, "make_plan", lose)
    inputs = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    summary = preprocess(job(corpus, inputs, tmp_path / "out", max_rejected=0.5))
    assert "out: 2 documents" in summary
    assert "rejected: 1 with unreadable file" in summary
    (tmp_path / "b.txt").write_text("some text")
    with pytest.raises(UserError, match=r"b\.txt: cannot be read \(No such file"):
        preprocess(job(corpus, inputs, tmp_path / "strict", options=STRICT))


def test_a_file_that_changes_stops_the_job(
    corpus: TokenisedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    plan = preprocess_module.make_plan

    def change(work: Job) -> Any:
        made = plan(work)
        (tmp_path / "a.txt").write_text("another text")
        return made

    monkeypatch.setattr(preprocess_module, "make_plan", change)
    with pytest.raises(UserError, match=r"a\.txt: changed while the job was running"):
        preprocess(job(corpus, [tmp_path / "a.txt"], tmp_path / "out"))


def test_the_manifest_lists_the_inputs_options_and_versions(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ["one", "two"])
    preprocess(job(corpus, [corpus.texts[0], tmp_path / "b.jsonl"], tmp_path / "out"))
    manifest = json.loads((tmp_path / "out.json").read_text())
    paths = [corpus.texts[0], tmp_path / "b.jsonl"]
    expected = [{"path": str(p), "bytes": p.stat().st_size, "digest": content_digest(p)} for p in paths]
    assert manifest["inputs"] == expected
    assert manifest["options"] == {"text_field": "text", "document_separator": None}
    assert manifest["versions"].keys() > {"git_commit", "transformers", "tokenizers"}


def test_the_index_is_the_one_that_megatron_core_writes(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    dataset = IndexedDataset(corpus.train)
    write_token_files(f"{tmp_path}/reference", [dataset[number].tolist() for number in range(len(dataset))])
    for suffix in (".bin", ".idx"):
        assert Path(f"{corpus.train}{suffix}").read_bytes() == Path(f"{tmp_path}/reference{suffix}").read_bytes()


def test_a_long_document_has_the_tokens_of_one_pass(
    corpus: TokenisedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in corpus.texts)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", [text])
    monkeypatch.setattr(readers, "LONG_BYTES", 10_000)
    monkeypatch.setattr(encoding, "LONG_CHARACTERS", 5_000)
    preprocess(job(corpus, [tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out"))
    tokenizer = load_tokenizer(corpus.tokenizer)
    expected = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    dataset = IndexedDataset(f"{tmp_path}/out")
    assert [dataset[number].tolist() for number in range(len(dataset))] == [expected, expected]


def word_level_tokenizer(folder: Path, vocabulary: dict[str, int], lower_case: bool = False) -> Path:
    """Write a tokenizer whose tokens are whole words to a folder."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: PLC0415

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_largest_id_decides_the_integer_type_and_the_vocabulary_size(tmp_path: Path) -> None:
    tokenizer = word_level_tokenizer(tmp_path / "tokenizer", {"<unk>": 0, "</s>": 1, "a": 2, " ": 3, "b": 70_000})
    (tmp_path / "a.txt").write_text("a b a")
    preprocess(Job([str(tmp_path / "a.txt")], str(tokenizer), f"{tmp_path}/out"))
    assert np.fromfile(tmp_path / "out.bin", dtype=np.int32).tolist() == [2, 3, 70_000, 3, 2, 1]
    assert read_metadata(f"{tmp_path}/out").vocab_size == 70_001  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("lower_case", "text", "warning"),
    [
        (False, "a b", ""),
        (
            False,
            "a c",
            "1 of 1 documents change when they are encoded and decoded, and 25.00% of the tokens are unknown",
        ),
        (True, "A b", "1 of 1 documents change when they are encoded and decoded, and 0.00% of the tokens are unknown"),
    ],
)
def test_a_tokenizer_that_loses_text_is_reported(
    tmp_path: Path, lower_case: bool, text: str, warning: str, capfd: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, " ": 4}
    tokenizer = word_level_tokenizer(tmp_path / "tokenizer", vocabulary, lower_case)
    (tmp_path / "a.txt").write_text(text)
    preprocess(Job([str(tmp_path / "a.txt")], str(tokenizer), f"{tmp_path}/out"))
    error = capfd.readouterr().err
    assert warning in error
    assert ("loses text" in error) == bool(warning)


def test_too_little_free_space_stops_a_job_before_it_starts(
    corpus: TokenisedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, tokens = sum(path.stat().st_size for path in corpus.texts[:-4]), Path(f"{corpus.train}.bin").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=tokens // 2))
    with pytest.raises(UserError, match=r"out\.bin: needs .* GiB, but .* GiB are free"):
        preprocess(job(corpus, corpus.texts[:-4], tmp_path / "out"))
    assert size > tokens
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=tokens * 2))
    preprocess(job(corpus, corpus.texts[:-4], tmp_path / "out"))


# MPI ranks, simulated by threads of this process.


class ThreadRanks:
    """MPI collective operations between threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._sent: list[Any] = [None] * size

    def exchange(self, rank: int, sent: Any) -> list[Any]:
        self._sent[rank] = sent
        self._barrier.wait()
        everything = list(self._sent)
        self._barrier.wait()
        return everything


class ThreadRank:
    def __init__(self, ranks: ThreadRanks, rank: int, size: int) -> None:
        self._ranks, self._rank, self._size = ranks, rank, size

    def Get_rank(self) -> int:  # noqa: N802
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._size

    def allgather(self, sendobj: Any) -> list[Any]:
        return self._ranks.exchange(self._rank, sendobj)

    def bcast(self, obj: Any) -> Any:
        return self._ranks.exchange(self._rank, obj)[0]


def on_ranks(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """Run `work` on each rank, and return the result or exception of each rank."""
    ranks, results = ThreadRanks(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(ranks, rank, size))
        except BaseException as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [2, 5])
def test_the_files_do_not_depend_on_the_number_of_ranks(
    corpus: TokenisedCorpus, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    inputs = [corpus.texts[0], tmp_path / "bad.txt", *corpus.texts[1:4]]
    monkeypatch.setattr(token_shards, "_SMALLEST_SHARD", 10_000)
    alone = preprocess(job(corpus, inputs, tmp_path / "alone", max_rejected=1))
    work = job(corpus, inputs, tmp_path / "ranks", max_rejected=1)
    summaries = on_ranks(size, lambda comm: preprocess_on_ranks(work, comm))
    assert contents(f"{tmp_path}/ranks") == contents(f"{tmp_path}/alone")
    assert summaries[1:] == [None] * (size - 1)
    assert summaries[0].split("bytes of text")[0] == alone.replace("/alone", "/ranks").split("bytes of text")[0]
    assert summaries[0].partition("rejected")[2] == alone.partition("rejected")[2]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("place", [0, 3])
def test_an_error_on_one_rank_ends_all_ranks_and_rank_0_reports_it(
    corpus: TokenisedCorpus, tmp_path: Path, place: int
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff" * 9000)
    inputs = list(corpus.texts[:3])
    inputs.insert(place, tmp_path / "bad.txt")
    work = job(corpus, inputs, tmp_path / "out", options=STRICT)
    first, *others = on_ranks(3, lambda comm: preprocess_on_ranks(work, comm))
    assert isinstance(first, UserError)
    assert "bad.txt: no UTF-8 text" in str(first)
    assert [(type(error), error.code) for error in others] == [(SystemExit, 2)] * 2
    assert os.listdir(tmp_path) == ["bad.txt"]


def _mpirun() -> str | None:
    """Return the mpirun command; skip the test if mpirun or mpi4py does not work."""
    found = shutil.which("mpirun")
    probe = [sys.executable, "-c", "from mpi4py import MPI"]
    return found if found and subprocess.run(probe, capture_output=True, check=False).returncode == 0 else None


@pytest.mark.parametrize("broken", [False, True])
def test_mpirun_writes_the_files_of_one_process(corpus: TokenisedCorpus, tmp_path: Path, broken: bool) -> None:
    mpirun = _mpirun()
    if mpirun is None:
        pytest.skip("mpirun or mpi4py is missing")
    inputs = [str(path) for path in corpus.texts[-4:]]
    if broken:
        inputs.append("none.txt")
    script = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
    line = [mpirun, "-n", "2", "--oversubscribe", sys.executable, str(script), "--strict", "--output", "out"]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [*line, "--tokenizer", str(corpus.tokenizer), "--input", *inputs],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    if broken:
        assert done.returncode != 0
        assert done.stderr.count("error: none.txt: no such file") == 1
        assert os.listdir(tmp_path) == []
    else:
        assert done.returncode == 0, done.stderr
        assert contents(f"{tmp_path}/out") == contents(corpus.valid)
        assert done.stdout.count("4 documents") == 1
