"""What the ranks do in the tests of numbers that go wrong and of copies that differ."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engine_runs import Watcher, engine_of, train_config
from small_runs import GLOBAL_BATCH, STEPS, Layout, batches_of_rank
from torch import Tensor

from hypermoe_ds.checkpoint.engine_state import EngineState
from hypermoe_ds.errors import MachineError
from hypermoe_ds.parallel.control_group import ControlGroup
from hypermoe_ds.resilience.replicas import ReplicaCheck
from hypermoe_ds.resilience.step_status import StepStatus
from hypermoe_ds.training.loop import StepObserver, optimizer_step
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.step_monitor import StepMonitor

BAD_STEP = 2
HYPERNETWORK = "model.hypernetwork.trunk.weight"
EXPERTS = "model.layers.1.mlp.experts.w2"


def spoil_gradient(engine: Any, name: str, value: float) -> None:
    """One element of a gradient of this rank becomes `value` in the next backward pass."""
    parameter = dict(engine.module.named_parameters())[name]

    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    handle = parameter.register_hook(spoil)


def infinite_loss(loss: Tensor) -> Tensor:
    """An infinite value with the gradients of the loss."""
    return loss + torch.full_like(loss, torch.inf)


def state_of(engine: Any) -> dict[str, Tensor]:
    """Copies of the master weights and moments, and of the weights that compute."""
    held = {name: tensor.clone() for name, tensor in EngineState(engine).tensors()}
    computing = {
        f"computing/{name}": getattr(parameter, "ds_tensor", parameter).detach().clone()
        for name, parameter in engine.module.named_parameters()
    }
    return held | computing


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Checkpoints:
    """As much of a manager as the guard asks."""

    failed = False

    def __init__(self, good: Path | None) -> None:
        self._good = good

    def newest(self) -> Path:
        return Path("checkpoints/step_7")

    def last_good(self) -> Path | None:
        return self._good


def guard_of(engine: Any, layout: Layout, said: list[str], good: Path | None = None, **train: Any) -> StepMonitor:
    config = train_config(layout).model_copy(update=train)
    return StepMonitor(engine, config, layout.expert, said.append, Checkpoints(good), lambda sample: f"of {sample}")  # type: ignore[arg-type]


def batches(layout: Layout, without: int | None) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches, those of one step left out."""
    for number, batch in enumerate(batches_of_rank(layout, torch.distributed.get_rank())):
        if number // layout.accumulation + 1 != without:
            yield batch


def end_step(engine: Any, step_monitor: StepMonitor, state: TrainState) -> StepStatus:
    """Advance and check the state after a step, as the training loop does."""
    status, first_sample = step_monitor.synchronize(), state.consumed_samples
    state.advance(first_sample + engine.train_batch_size(), status.skipped)
    step_monitor.check(state, first_sample, status)
    return status


def take(engine: Any, step_monitor: StepMonitor, state: TrainState, source: Iterator[Any]) -> tuple[float, float]:
    """A guarded step: the loss and the rate it was taken with."""
    watcher = Watcher(engine.module.config.num_experts)
    rate = engine.get_lr()[0]
    optimizer_step(engine, source, watcher, step_monitor.watch)
    assert not end_step(engine, step_monitor, state).stop
    return watcher.read().scalars["total_loss"], rate


def skip_each(layouts: list[Layout], what: str) -> None:
    """Under each layout: a bad step changes nothing, and the run continues as if its samples had not been there."""
    for layout in layouts:
        said: list[str] = []
        engine = engine_of(layout)
        step_monitor, state, source = guard_of(engine, layout, said), TrainState(), batches(layout, None)
        taken, before = [], {}
        for step in range(1, STEPS + 1):
            if step == BAD_STEP:
                before, counters = state_of(engine), EngineState(engine).counters()
                if torch.distributed.get_rank() == 1:
                    _make_bad(engine, step_monitor, what)
            taken.append(take(engine, step_monitor, state, source))
            if step == BAD_STEP:
                assert same(state_of(engine), before)
                after = EngineState(engine).counters()
                changed = {key for key in after if after[key] != counters[key]}
                assert changed == {"global_steps", "global_samples", "skipped_steps"}, changed
                assert (state.bad_steps, state.consumed_samples) == (1, BAD_STEP * GLOBAL_BATCH)
        assert (state.bad_steps, engine.skipped_steps) == (0, 1)
        [line] = said
        assert line.startswith(f"warning: step {BAD_STEP} skipped: NaN or Inf in its loss (")
        ended = state_of(engine)
        engine.destroy()
        _compare(layout, taken, ended)


def _make_bad(engine: Any, step_monitor: StepMonitor, what: str) -> None:
    if what == "loss":
        watch = step_monitor._losses.add

        def once(loss: Tensor) -> Tensor:
            step_monitor._losses.add = watch  # type: ignore[method-assign]
            return watch(infinite_loss(loss))

        step_monitor._losses.add = once  # type: ignore[method-assign]
    else:
        spoil_gradient(engine, what, torch.nan if what == HYPERNETWORK else torch.inf)


def _compare(layout: Layout, taken: list[tuple[float, float]], ended: dict[str, Tensor]) -> None:
    """With a run that never saw the samples of the bad step; its rates are those of the steps that were taken."""
    engine = engine_of(layout)
    step_monitor, state, source = guard_of(engine, layout, []), TrainState(), batches(layout, BAD_STEP)
    without = [take(engine, step_monitor, state, source) for _ in range(STEPS - 1)]
    del taken[BAD_STEP - 1]
    assert taken == without
    assert same(ended, state_of(engine))
    engine.destroy()


def too_many_bad_steps(layout: Layout, good: Path | None) -> tuple[str, int]:
    """Two bad steps where one is allowed, with this good checkpoint: what is raised, after which step."""
    engine = engine_of(layout)
    step_monitor = guard_of(engine, layout, [], good, max_bad_steps=1)
    state, source = TrainState(), batches(layout, None)
    try:
        for step in range(STEPS):
            if step in (0, 2, 3) and torch.distributed.get_rank() == 0:
                spoil_gradient(engine, HYPERNETWORK, torch.nan)
            take(engine, step_monitor, state, source)
    except Exception as error:
        return str(error), state.step
    return "", state.step


def flip_each(layouts: list[Layout], rank: int) -> list[list[str | None]]:
    """Under each layout: what the comparison says of equal copies, then with a bit flipped on one rank."""
    told = []
    for layout in layouts:
        engine = engine_of(layout)
        optimizer_step(engine, batches(layout, None), StepObserver())
        check = ReplicaCheck(engine, ControlGroup(), layout.expert)
        found: list[str | None] = [_told(check)]
        for name in (HYPERNETWORK, EXPERTS):
            parameter = dict(engine.module.named_parameters())[name]
            bits = parameter.data.view(torch.int16).view(-1)
            if torch.distributed.get_rank() == rank:
                bits[-1] ^= 4
            found.append(_told(check))
            if torch.distributed.get_rank() == rank:
                bits[-1] ^= 4
        told.append(found)
        engine.destroy()
    return told


def _told(check: ReplicaCheck) -> str | None:
    try:
        check.run(5)
    except MachineError as fault:
        return str(fault)
    return None


def spike(layout: Layout) -> list[str]:
    """Twenty calm losses, then one micro-batch of rank 1 that stands out."""
    engine = engine_of(layout)
    said: list[str] = []
    step_monitor, state = guard_of(engine, layout, said), TrainState()
    for step in range(21):
        for number in range(layout.accumulation):
            bad = step == 20 and torch.distributed.get_rank() == 1 and number == 1
            step_monitor.watch(torch.tensor(9.0 if bad else 2.0 + 0.01 * (step % 3)))
        end_step(engine, step_monitor, state)
    return said


def asked_to_stop(layout: Layout, rank: int) -> list[bool]:
    """Whether each step ends the run, where one rank is asked to after the second."""
    engine = engine_of(layout)
    step_monitor, state = guard_of(engine, layout, []), TrainState()
    stops = []
    for step in range(4):
        if step == 2 and torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        step_monitor.watch(torch.tensor(2.0))
        stops.append(end_step(engine, step_monitor, state).stop)
    return stops
