"""Trace training steps with the PyTorch profiler, with named regions for the parts of the model."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import disk_errors
from hypermoe_ds.monitor.settings import MonitorConfig

_OPERATORS = 10  # number of rows in the operator table
_NAME_WIDTH = 60
_MEMORY_EVENTS = 1_000_000


class Profiler:
    """Trace the steps of `monitor.profile_steps` on the ranks of `monitor.profile_ranks`.

    Args:
        config: steps and ranks to trace.
        folder: RUN_DIR/profile; created when a trace is written.
        rank: this rank.
        model: the model, whose parts become named regions of the trace.
        log: function that prints a line.
    """

    def __init__(
        self, config: MonitorConfig, folder: Path, rank: int, model: nn.Module, log: Callable[[str], None]
    ) -> None:
        first, last = config.profile_steps or (0, 0)
        is_traced = config.profile_steps is not None and rank in config.profile_ranks
        self._first, self._last = (first, last) if is_traced else (0, 0)
        self._keeps_memory = config.memory_snapshot and uses_gpu()
        if config.memory_snapshot and not uses_gpu():
            log("warning: monitor.memory_snapshot needs a GPU: no snapshot is written")
        self._path = folder / f"rank_{rank:05d}_steps_{first}_{last}"
        self._model = model
        self._log = log
        self._trace: profile | None = None

    def region(self, name: str) -> AbstractContextManager[Any]:
        """Label the code inside the context in the trace; do nothing if no trace is running."""
        return nullcontext() if self._trace is None else record_function(name)

    def before_step(self, step: int) -> None:
        """Start the trace if this is the first step to trace."""
        if step != self._first:
            return
        if self._keeps_memory:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        gpu = [ProfilerActivity.CUDA] if uses_gpu() else []
        self._trace = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._regions = ModelRegions(self._model)
        self._trace.start()

    def after_step(self, step: int) -> None:
        """Stop and write the trace if this was the last step to trace.

        Raises:
            MachineError: the files cannot be written.
        """
        if self._trace is None or step != self._last:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        self._regions.remove()
        with disk_errors(self._path):
            self._path.parent.mkdir(exist_ok=True)
            trace.export_chrome_trace(f"{self._path}.json.gz")
            by = "self_cuda_time_total" if uses_gpu() else "self_cpu_time_total"
            averages = trace.key_averages()
            averages[:] = [event for event in averages if not event.is_user_annotation]  # drop named regions
            table = averages.table(sort_by=by, row_limit=_OPERATORS, max_name_column_width=_NAME_WIDTH)
            Path(f"{self._path}_operators.txt").write_text(f"{table}\n", encoding="utf-8")
            if self._keeps_memory:
                torch.cuda.memory._dump_snapshot(f"{self._path}_memory.pickle")  # type: ignore[no-untyped-call]
                torch.cuda.memory._record_memory_history(enabled=None)
        self._log(f"wrote the profile of steps {self._first} to {self._last}: {self._path}.json.gz and _operators.txt")


class ModelRegions:
    """Label the parts of a model's forward pass in the trace, until `remove` is called.

    The region "dispatch" lasts from the router to the experts, and "combine" from the experts to the end of the MoE
    block. With expert parallelism, both contain an all-to-all exchange. HyperExperts start within "dispatch".

    Args:
        model: the training model, with or without AutoEP.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handles: list[Any] = []
        self._open: dict[str, list[Any]] = {}
        for name, module in model.named_modules():
            if name.endswith(".self_attn"):
                self._enclose(module, "attention")
            elif name.endswith((".hyper_experts", ".hypernetwork")):
                self._enclose(module, "hyper_experts")
            elif name.endswith("lm_head"):
                self._enclose(module, "head")
            elif hasattr(module, "experts") and hasattr(module, "router"):
                self._name_moe_block(module)

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _name_moe_block(self, block: Any) -> None:
        self._enclose(block.router, "router")
        self._after(block.router, lambda: self._begin("dispatch"))
        self._before(block.experts, lambda: self._end("dispatch"))
        self._enclose(block.experts, "experts")
        self._after(block.experts, lambda: self._begin("combine"))
        self._after(block, lambda: self._end("combine"))

    def _enclose(self, module: nn.Module, name: str) -> None:
        self._before(module, lambda: self._begin(name))
        self._after(module, lambda: self._end(name))

    def _before(self, module: nn.Module, action: Callable[[], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _module, _inputs: action()))

    def _after(self, module: nn.Module, action: Callable[[], None]) -> None:
        self._handles.append(module.register_forward_hook(lambda _module, _inputs, _output: action()))

    def _begin(self, name: str) -> None:
        region = record_function(name)
        region.__enter__()  # type: ignore[no-untyped-call]
        self._open.setdefault(name, []).append(region)

    def _end(self, name: str) -> None:
        if self._open.get(name):
            self._open[name].pop().__exit__(None, None, None)
