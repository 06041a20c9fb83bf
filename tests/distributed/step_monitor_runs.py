"""Code that ranks run in the tests of bad steps, loss spikes, stop signals and diverged replicas."""

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
from hypermoe_ds.training.loop import optimizer_step
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.step_monitor import StepMonitor
from hypermoe_ds.training.step_observer import StepObserver

BAD_STEP = 2
HYPERNETWORK = "model.hypernetwork.trunk.weight"
EXPERTS = "model.layers.1.mlp.experts.w2"


def spoil_gradient(engine: Any, name: str, value: float) -> None:
    """Set one element of this rank's gradient of a parameter to `value` in the next backward pass."""
    parameter = dict(engine.module.named_parameters())[name]

    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    handle = parameter.register_hook(spoil)


def infinite_loss(loss: Tensor) -> Tensor:
    """Return an infinite loss with finite gradients."""
    return loss + torch.full_like(loss, torch.inf)


def state_of(engine: Any) -> dict[str, Tensor]:
    """Copy the master weights, the moments and the weights used for computation."""
    owned = {name: tensor.clone() for name, tensor in EngineState(engine).tensors()}
    computing = {
        f"computing/{name}": getattr(parameter, "ds_tensor", parameter).detach().clone()
        for name, parameter in engine.module.named_parameters()
    }
    return owned | computing


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Checkpoints:
    """Minimal stand-in for the checkpoint manager that the step monitor uses."""

    failed = False

    def __init__(self, good: Path | None) -> None:
        self._good = good

    def newest(self) -> Path:
        return Path("checkpoints/step_7")

    def last_good(self) -> Path | None:
        return self._good


def step_monitor_of(
    engine: Any, layout: Layout, lines: list[str], good: Path | None = None, **train: Any
) -> StepMonitor:
    config = train_config(layout).model_copy(update=train)
    return StepMonitor(
        engine,
        config,
        layout.expert,
        ControlGroup(),
        lines.append,
        Checkpoints(good),  # type: ignore[arg-type]
        lambda sample: f"of {sample}",
    )


def batches(layout: Layout, without: int | None) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's micro-batches, except those of step `without`."""
    for number, batch in enumerate(batches_of_rank(layout, torch.distributed.get_rank())):
        if number // layout.accumulation + 1 != without:
            yield batch


def end_step(engine: Any, step_monitor: StepMonitor, state: TrainState) -> StepStatus:
    """Update and check the training state after a step, as the training loop does."""
    status, first_sample = step_monitor.synchronize(), state.consumed_samples
    state.advance(first_sample + engine.train_batch_size(), status.skipped)
    step_monitor.check(state, first_sample, status)
    return status


def take(engine: Any, step_monitor: StepMonitor, state: TrainState, source: Iterator[Any]) -> tuple[float, float]:
    """Take one step with the step monitor; return its loss and learning rate."""
    watcher = Watcher(engine.module.config.num_experts)
    rate = engine.get_lr()[0]
    optimizer_step(engine, source, watcher, step_monitor.watch)
    assert not end_step(engine, step_monitor, state).stop
    return watcher.read().scalars["total_loss"], rate


def skip_each(layouts: list[Layout], what: str) -> None:
    """Check that a bad step changes no weights and that the run continues as if its samples were skipped."""
    for layout in layouts:
        lines: list[str] = []
        engine = engine_of(layout)
        step_monitor, state, source = step_monitor_of(engine, layout, lines), TrainState(), batches(layout, None)
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
        [line] = lines
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
    """Compare the run with one that never reads the samples of the bad step.

    The learning rates of that run must equal those of the good steps.
    """
    engine = engine_of(layout)
    step_monitor, state, source = step_monitor_of(engine, layout, []), TrainState(), batches(layout, BAD_STEP)
    without = [take(engine, step_monitor, state, source) for _ in range(STEPS - 1)]
    del taken[BAD_STEP - 1]
    assert taken == without
    assert same(ended, state_of(engine))
    engine.destroy()


def too_many_bad_steps(layout: Layout, good: Path | None) -> tuple[str, int]:
    """Take two bad steps where only one is allowed; return the error and the step at which it is raised."""
    engine = engine_of(layout)
    step_monitor = step_monitor_of(engine, layout, [], good, max_bad_steps=1)
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
    """Compare equal replicas, then replicas with one bit flipped on one rank; return the errors for each layout."""
    errors = []
    for layout in layouts:
        engine = engine_of(layout)
        optimizer_step(engine, batches(layout, None), StepObserver())
        check = ReplicaCheck(engine, ControlGroup(), layout.expert)
        found: list[str | None] = [_error_of(check)]
        for name in (HYPERNETWORK, EXPERTS):
            parameter = dict(engine.module.named_parameters())[name]
            bits = parameter.data.view(torch.int16).view(-1)
            if torch.distributed.get_rank() == rank:
                bits[-1] ^= 4
            found.append(_error_of(check))
            if torch.distributed.get_rank() == rank:
                bits[-1] ^= 4
        errors.append(found)
        engine.destroy()
    return errors


def _error_of(check: ReplicaCheck) -> str | None:
    try:
        check.run(5)
    except MachineError as fault:
        return str(fault)
    return None


def spike(layout: Layout) -> list[str]:
    """Watch twenty steps of similar losses, then one much larger loss in a micro-batch of rank 1.

    Return the log lines.
    """
    engine = engine_of(layout)
    lines: list[str] = []
    step_monitor, state = step_monitor_of(engine, layout, lines), TrainState()
    for step in range(21):
        for number in range(layout.accumulation):
            bad = step == 20 and torch.distributed.get_rank() == 1 and number == 1
            step_monitor.watch(torch.tensor(9.0 if bad else 2.0 + 0.01 * (step % 3)))
        end_step(engine, step_monitor, state)
    return lines


def asked_to_stop(layout: Layout, rank: int) -> list[bool]:
    """Send SIGTERM to one rank after the second step, and return whether the run stops after each step."""
    engine = engine_of(layout)
    step_monitor, state = step_monitor_of(engine, layout, []), TrainState()
    stops = []
    for step in range(4):
        if step == 2 and torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        step_monitor.watch(torch.tensor(2.0))
        stops.append(end_step(engine, step_monitor, state).stop)
    return stops
