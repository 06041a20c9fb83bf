"""Run test functions on several ranks, which are processes of one gloo process group.

The ranks are forked from a server process that has already imported the libraries, so a process group starts within a
second. The server runs no test code, so every group starts from the same state.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

# Do not preload the project itself: ranks must import it from this checkout, even if another version is installed.
_PRELOADED = [
    "torch._dynamo",
    "deepspeed.moe.utils",
    "transformers.masking_utils",
    "megatron.core.datasets.indexed_dataset",
]
_SECONDS = 300
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

Environment = dict[str, str]


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on every rank of a new process group.

    Args:
        world_size: number of ranks.
        function: module-level function, called after the rank has joined the process group.
        arguments: picklable arguments of the function.

    Returns:
        The return values in the order of the ranks.

    Raises:
        RuntimeError: a rank failed; the message is its traceback.
    """
    with process_group(world_size) as environments:
        return run_in_processes(environments, _call_in_group, function, *arguments)


@contextmanager
def process_group(world_size: int) -> Iterator[list[Environment]]:
    """Yield the environment variables that the launcher would set for each rank."""
    # The operating system chooses a free port and the store keeps it open, so concurrent groups use different ports.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    # Do not set LOCAL_SIZE: with it, DeepSpeed leaves 66 MB per rank in /dev/shm.
    shared["WORLD_SIZE"] = str(world_size)
    yield [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def run_in_processes(environments: list[Environment], function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in one new process per environment, and return the results.

    If one process fails, kill the others and raise a `RuntimeError` with the traceback of the failed process.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(number) for number in range(len(environments))]
        with _started(environments, results, function, arguments) as processes:
            _await_all(processes)
        outcomes = [pickle.loads(result.read_bytes()) for result in results if result.exists()]
    for outcome in outcomes:
        if outcome.failure is not None:
            raise RuntimeError(outcome.failure)
    if len(outcomes) < len(environments):
        raise RuntimeError(f"ranks ended without a result: exit codes {[process.exitcode for process in processes]}")
    return [outcome.value for outcome in outcomes]


@contextmanager
def ranks_of(environments: list[Environment], function: Callable[..., Any], *arguments: Any) -> Iterator[list[Any]]:
    """Yield processes that join one group and call `function(*arguments)`. On exit, kill them and discard results."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(number) for number in range(len(environments))]
        with _started(environments, results, _call_in_group, (function, *arguments)) as processes:
            yield processes


@contextmanager
def _started(
    environments: list[Environment], results: list[Path], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Iterator[list[Any]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    processes = [
        context.Process(target=_main, args=(environment, result, function, arguments))
        for environment, result in zip(environments, results, strict=True)
    ]
    with mock.patch.dict(os.environ, CPU):
        for process in processes:
            process.start()
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.join()


@dataclass
class _Outcome:
    value: Any = None
    failure: str | None = None


def _await_all(processes: list[Any]) -> None:
    """Wait until all processes have succeeded, one has failed, or none has ended for 300 s."""
    waiting = list(processes)
    while waiting:
        ended = multiprocessing.connection.wait([process.sentinel for process in waiting], _SECONDS)
        if not ended or any(process.exitcode for process in waiting):
            return
        waiting = [process for process in waiting if process.exitcode is None]


def _main(environment: Environment, result: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    gc.freeze()  # so that garbage collections that ZeRO 3 triggers do not scan all objects of the libraries
    # Without a GPU, DeepSpeed loads a compiled operator for communication, which needs ninja on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        outcome = _Outcome(value=function(*arguments))
    except BaseException:
        outcome = _Outcome(failure=traceback.format_exc())
    partial = result.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(result)
    if outcome.failure is not None:
        sys.exit(1)


def _call_in_group(function: Callable[..., Any], *arguments: Any) -> Any:
    import torch  # noqa: PLC0415 (only the ranks import torch)

    from hypermoe_ds.training.engine import start_ranks  # noqa: PLC0415

    torch.set_num_threads(1)
    start_ranks()
    value = function(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return value
