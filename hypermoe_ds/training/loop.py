"""The training loop."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.training.evaluation import Evaluation
from hypermoe_ds.training.guard import Guard
from hypermoe_ds.training.recorder import Recorder
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.watchdog import Watchdog


def train(
    engine: Any,
    batches: Iterator[dict[str, Tensor]],
    state: TrainState,
    last_step: int,
    recorder: Recorder,
    checkpoints: CheckpointManager,
    validate: Callable[[], Evaluation] | None,
    validation_interval: int,
    guard: Guard,
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
        observed = recorder.is_due(state.step + 1)
        watchdog.begin(state.step + 1, "beginning")
        tokens = optimizer_step(engine, batches, recorder if observed else None, guard.watch)
        agreed = guard.after_step(state)
        stopping = agreed.stop and state.step < last_step
        recorder.throughput.count(tokens)
        if observed:
            recorder.record(state, learning_rate, float(engine.get_global_grad_norm()), engine.skipped_steps)

        ending = state.step == last_step
        with recorder.throughput.paused():
            if validate is not None and not stopping and (ending or state.step % validation_interval == 0):
                recorder.record_validation(state.step, validate())
            unsaved = unsaved or agreed.unsaved or checkpoints.is_due(state.step)
            if ending or stopping or (unsaved and not state.bad_steps):
                watchdog.begin(state.step, "saving")
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
    recorder: Recorder | None,
    watch: Callable[[Tensor], Tensor] = _as_it_is,
) -> int:
    """Run one optimizer step over its micro-batches.

    Args:
        engine: the DeepSpeed engine; it scales, accumulates, clips and steps.
        batches: this rank's micro-batches.
        recorder: takes the outputs of a step that is logged.
        watch: sees each loss, and gives what its backward pass starts from.

    Returns:
        Tokens of the step over all ranks.
    """
    tokens = 0
    for _ in range(engine.gradient_accumulation_steps()):
        batch = {name: value.to(engine.device, non_blocking=True) for name, value in next(batches).items()}
        output = engine(
            input_ids=batch["input_ids"],
            shift_labels=batch["labels"],
            use_cache=False,
            output_router_logits=recorder is not None,
            output_logits=False,
        )
        engine.backward(watch(output.loss))
        engine.step()
        tokens += batch["input_ids"].numel()
        if recorder is not None:
            recorder.observe(output)
    return tokens * int(engine.dp_world_size)
