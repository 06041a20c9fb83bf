"""Measure the data path: tokenisation and its memory, the data loader, and the order of the samples.

    python benchmarks/data.py encoding --input PATH... --tokenizer DIR
    python benchmarks/data.py memory --input PATH... --tokenizer DIR [--megabytes 1000]
    python benchmarks/data.py loader --data PREFIX
    python benchmarks/data.py order [--documents 5000000] [--samples 100000000]

`encoding` compares `preprocess` with a loop that only calls the tokenizer. `memory` tokenises the same text as one
file, as one line and as JSON records of 100 bytes. `loader` measures samples per second. `order` compares the order
of the samples with the index that megatron-core's GPTDataset builds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from hypermoe_ds.data.inputs import find_inputs
from hypermoe_ds.data.loader import build_loader
from hypermoe_ds.data.preprocess import Job, TokenizerFile, preprocess
from hypermoe_ds.data.readers import DocumentReader, ReadOptions
from hypermoe_ds.data.settings import DataConfig, DatasetConfig
from hypermoe_ds.data.token_files import write_index
from hypermoe_ds.data.training_set import TrainingSet, build_training_set
from hypermoe_ds.process import one_line_errors
from results import check_arguments, machine_line

_REPOSITORY = Path(__file__).parents[1]
_BATCH = 64  # documents that the tokenizer encodes at once
_DOCUMENT_TOKENS = 1000  # tokens per document of the order benchmark
_SECONDS_BETWEEN_SAMPLES = 0.05


def main() -> None:
    """Run one benchmark and print its results."""
    arguments = parse_arguments()
    check_arguments(arguments, dict.fromkeys(("rounds", "megabytes", "documents", "samples", "sequence_length"), 1))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        arguments.run(arguments, Path(folder))
    print(machine_line("cpu"))


def compare_encoding(arguments: argparse.Namespace, folder: Path) -> None:
    """Compare `preprocess` with one and two workers with a loop that only calls the tokenizer."""
    files, encoder = find_inputs(arguments.input), TokenizerFile.of(arguments.tokenizer).encoder()
    documents = [str(each) for file in files for each in DocumentReader(file, ReadOptions(), lambda _: None)]
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    fast = encoder._fast
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # use one core, as a worker does

    def bare() -> None:
        for first in range(0, len(documents), _BATCH):
            for encoding in fast.encode_batch_fast(documents[first : first + _BATCH], add_special_tokens=False):
                np.array(encoding.ids, dtype=encoder.dtype)

    def with_workers(number: int) -> None:
        preprocess(Job(arguments.input, arguments.tokenizer, f"{folder}/out", workers=number, overwrite=True))

    sides: dict[str, Callable[[], None]] = {
        "tokenizer alone": bare,
        "1 worker": lambda: with_workers(1),
        "2 workers": lambda: with_workers(2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):  # the sides alternate
        for name, side in sides.items():
            seconds[name].append(timed(side))
    alone = median(seconds["tokenizer alone"])
    print(f"{megabytes:,.1f} MB of text in {len(documents):,} documents\n")
    print("| side | seconds | MB/s | speed relative to the tokenizer alone |\n| --- | ---: | ---: | ---: |")
    for name, times in seconds.items():
        print(f"| {name} | {median(times):.2f} | {megabytes / median(times):.1f} | {alone / median(times):.2f} |")
    print()


def measure_memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Tokenise a text as one file, as one line and as records, and print the peak memory of all processes."""
    texts = [str(each) for file in find_inputs(arguments.input) for each in DocumentReader(file, ReadOptions(), print)]
    size = arguments.megabytes * 1_000_000
    print("| input | seconds | MB/s | peak memory of all processes, MB |\n| --- | ---: | ---: | ---: |")
    for name, write in {
        "one text file": _text_file,
        "one line of text": _one_line,
        "100-byte records": _records,
    }.items():
        path = write(folder, texts, size)
        command = [sys.executable, _REPOSITORY / "tools/preprocess_data.py", "--input", path, "--overwrite"]
        command += ["--tokenizer", arguments.tokenizer, "--output", folder / "out", "--workers", arguments.workers]
        began = time.perf_counter()
        peak = peak_memory([str(word) for word in command])
        seconds = time.perf_counter() - began
        speed = path.stat().st_size / 1e6 / seconds
        print(f"| {name} | {seconds:.0f} | {speed:.1f} | {peak / 1e6:,.0f} |", flush=True)
        path.unlink()
    print()


def _text_file(folder: Path, texts: list[str], size: int) -> Path:
    with (folder / "text.txt").open("w", encoding="utf-8") as file:
        file.writelines(_repeated(texts, size))
    return folder / "text.txt"


def _one_line(folder: Path, texts: list[str], size: int) -> Path:
    with (folder / "line.txt").open("w", encoding="utf-8") as file:
        file.writelines(text.replace("\n", " ") for text in _repeated(texts, size))
    return folder / "line.txt"


def _records(folder: Path, texts: list[str], size: int) -> Path:
    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for text in _repeated(texts, size):
            file.writelines(json.dumps({"text": text[first : first + 85]}) + "\n" for first in range(0, len(text), 85))
    return folder / "records.jsonl"


def _repeated(texts: list[str], size: int) -> Iterator[str]:
    """Repeat the texts until they have `size` characters."""
    for text in cycle(texts):
        yield text[:size]
        size -= len(text)
        if size <= 0:
            return


def peak_memory(command: list[str]) -> int:
    """Run a command, and return the largest sum of the proportional set sizes of its processes in bytes."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _memory(psutil.Process(process.pid)))
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak


def _memory(process: psutil.Process) -> int:
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # the process has just ended
            continue
    return total


def measure_loader(arguments: argparse.Namespace, _folder: Path) -> None:
    """Print how many samples per second the data loader of one rank delivers."""
    length, batch = arguments.sequence_length, 8
    print("| workers | samples/s | tokens/s |\n| ---: | ---: | ---: |")
    for workers in (0, 2):
        samples = training_set([arguments.data], length, arguments.rounds * 2000)
        batches = build_loader(samples, batch, 0, 1, 0, workers, vocab_size=2**31)
        next(batches)
        number = len(samples) // batch - 1
        speed = number * batch / timed(partial(deque, islice(batches, number), maxlen=0))
        print(f"| {workers} | {speed:,.0f} | {speed * length:,.0f} |")
    print()


def training_set(prefixes: list[str], length: int, samples: int) -> TrainingSet:
    """Build the training set of a run with one stage."""
    datasets = [DatasetConfig(prefix=prefix) for prefix in prefixes]
    config = DataConfig(train=datasets, sequence_length=length, tokenizer="unused")
    return build_training_set(config, 1234, [(0, config.all_stages()[0])], samples)


def compare_order(arguments: argparse.Namespace, folder: Path) -> None:
    """Compare the time and memory until the first and the last sample are read with those of megatron-core."""
    prefix, lengths = str(folder / "tokens"), folder / "lengths"
    np.full(arguments.documents, _DOCUMENT_TOKENS, dtype=np.int32).tofile(lengths)
    write_index(Path(f"{prefix}.idx"), np.uint16, [lengths], arguments.documents)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * _DOCUMENT_TOKENS * arguments.documents)  # a sparse file of zeros
    print(f"{arguments.documents:,} documents, {arguments.samples:,} samples of {arguments.sequence_length} tokens\n")
    print("| order | launch, s | launch with a cache, s | memory, MB | index on disk, MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, build in {"computed": _computed, "GPTDataset": _gpt_dataset}.items():
        results = [in_new_process(build, prefix, arguments.sequence_length, arguments.samples) for _ in range(2)]
        (first, memory), (again, _) = results
        cache = sum(path.stat().st_size for path in (folder / "cache").glob("*")) / 1e6
        print(f"| {name} | {first:.2f} | {again:.2f} | {memory / 1e6:,.0f} | {cache:,.0f} |", flush=True)
    print()


def _computed(prefix: str, length: int, samples: int) -> Any:
    return training_set([prefix], length, samples)


def _gpt_dataset(prefix: str, length: int, samples: int) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod, vocab_size, unique_identifiers = 0, 1, {"class": "benchmark"}

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(Path(prefix).parent / "cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def in_new_process(build: Callable[..., Any], *arguments: Any) -> tuple[float, int]:
    """Build samples in a forked process, and return the seconds and the additional memory in bytes."""
    context = get_context("fork")
    queue: Any = context.SimpleQueue()

    def measure() -> None:
        before, began = psutil.Process().memory_info().rss, time.perf_counter()
        samples = build(*arguments)
        for index in (0, len(samples) - 1):
            samples[index]
        queue.put((time.perf_counter() - began, psutil.Process().memory_info().rss - before))

    process = context.Process(target=measure)
    process.start()
    result: tuple[float, int] = queue.get()
    process.join()
    return result


def timed(function: Callable[[], object]) -> float:
    """Call a function and return its time in seconds."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="encoding|memory|loader|order")
    runs = {"encoding": compare_encoding, "memory": measure_memory, "loader": measure_loader, "order": compare_order}
    for name, run in runs.items():
        command = commands.add_parser(name, help=(run.__doc__ or "").strip())
        command.set_defaults(run=run, rounds=3, megabytes=1000, documents=1, samples=1, sequence_length=2048)
        command.add_argument("--folder", type=Path, help="folder for temporary files (default: the system's)")
        if name in ("encoding", "memory"):
            command.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files and folders of text")
            command.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
        if name == "encoding":
            command.add_argument("--rounds", type=int, metavar="N", help="measurements of each side (default: 3)")
        if name == "memory":
            command.add_argument("--workers", type=int, default=2, metavar="N", help="default: 2")
            command.add_argument("--megabytes", type=int, metavar="N", help="size of the text (default: 1000)")
        if name == "loader":
            command.add_argument("--data", required=True, metavar="PREFIX", help="path of token files")
        if name == "order":
            command.add_argument("--documents", type=int, default=5_000_000, metavar="N", help="default: 5000000")
            command.add_argument("--samples", type=int, default=100_000_000, metavar="N", help="default: 100000000")
        if name in ("loader", "order"):
            command.add_argument("--sequence-length", type=int, default=2048, metavar="TOKENS", help="default: 2048")
    return parser.parse_args()


if __name__ == "__main__":
    with one_line_errors():
        main()
