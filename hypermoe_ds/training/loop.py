"""The training loop."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.resilience.watchdog import Watchdog
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.step_monitor import StepMonitor

if TYPE_CHECKING:
    from hypermoe_ds.monitor.step_clock import Part
    from hypermoe_ds.training.recorder import Recorder
    from hypermoe_ds.training.validation import Validation


class StepObserver:
    """See what an optimizer step does. This one looks at nothing.

    Attributes:
        logs: whether the forward passes of the step show their routing.
    """

    logs = False

    def measure(self, _part: "Part") -> AbstractContextManager[None]:
        """Enclose a part of the step."""
        return nullcontext()

    def observe(self, output: Any) -> None:
        """Take the output of a micro-batch."""

    def observe_gradients(self) -> None:
        """Take the gradients, between the last backward pass and the step."""


def train(
    engine: Any,
    batches: Iterator[dict[str, Tensor]],
    state: TrainState,
    last_step: int,
    recorder: "Recorder",
    checkpoints: CheckpointManager,
    validate: "Callable[[], Validation] | None",
    validation_interval: int,
    step_monitor: StepMonitor,
    watchdog: Watchdog,
) -> bool:
    """Train until `last_step` or a signal; log, validate and save when each is due, and at the end.

    A checkpoint that could not be written beside the training is written again after the step in which that shows. One
    that is due in a row of bad steps is written after the first good one: a streak may begin with a NaN in the weights.
    At the end it is written all the same, and no older one is removed.

    Args:
        engine: the DeepSpeed engine.
        batches: this rank's micro-batches, from where `state` stands.
        state: position of the run, moved on.
        last_step: step after which this start ends.
        recorder: logs the steps.
        checkpoints: saves the run.
        validate: runs the validation (collective); None has none.
        validation_interval: steps between two validations.
        guard: moves `state` on, skips what went wrong, knows of signals.
        watchdog: told what this rank begins.

    Returns:
        Whether a signal ended it before `last_step`. It then saves and does not validate: there may be little time.
    """
    stopping = unsaved = False
    while state.step < last_step and not stopping:
        learning_rate = engine.get_lr()[0]
        recorder.begin(state.step + 1)
        watchdog.begin(state.step + 1, "beginning")
        tokens = optimizer_step(engine, batches, recorder, step_monitor.watch)
        status = step_monitor.after_step(state)
        stopping = status.stop and state.step < last_step
        recorder.end(state.step, tokens)
        if recorder.logs:
            recorder.record(state, learning_rate)

        ending = state.step == last_step
        if validate is not None and not stopping and (ending or state.step % validation_interval == 0):
            with recorder.clock.excluded():
                recorder.record_validation(state.step, validate())
        unsaved = unsaved or status.unsaved or checkpoints.is_due(state.step)
        if ending or stopping or (unsaved and not state.bad_steps):
            watchdog.begin(state.step, "saving")
            with recorder.measure("checkpoint"):
                checkpoints.save(state.step, state.to_dict(), prune=not state.bad_steps)
            unsaved = False
    checkpoints.finish()
    watchdog.note_end(saved=stopping)
    return stopping


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def optimizer_step(
    engine: Any,
    batches: Iterator[dict[str, Tensor]],
    observer: StepObserver,
    watch: Callable[[Tensor], Tensor] = _as_it_is,
) -> int:
    """Run one optimizer step over its micro-batches.

    Args:
        engine: the DeepSpeed engine; it scales, accumulates, clips and steps.
        batches: this rank's micro-batches.
        observer: sees the parts of the step, its outputs and its gradients.
        watch: sees each loss, and gives what its backward pass starts from.

    Returns:
        Tokens of the step over all ranks.
    """
    tokens = 0
    micro_batches = engine.gradient_accumulation_steps()
    for number in range(1, micro_batches + 1):
        with observer.measure("data"):
            batch = {name: value.to(engine.device, non_blocking=True) for name, value in next(batches).items()}
        with observer.measure("forward"):
            output = engine(
                input_ids=batch["input_ids"],
                shift_labels=batch["labels"],
                use_cache=False,
                output_router_logits=observer.logs,
                output_logits=False,
            )
        with observer.measure("backward"):
            engine.backward(watch(output.loss))
        if number == micro_batches:
            observer.observe_gradients()
        with observer.measure("optimizer"):
            engine.step()
        tokens += batch["input_ids"].numel()
        observer.observe(output)
    return tokens * int(engine.dp_world_size)
