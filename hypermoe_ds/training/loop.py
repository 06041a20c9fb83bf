"""The training loop."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.data.loader import IGNORED_LABEL
from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.data.stage_start import StageStart
from hypermoe_ds.resilience.watchdog import Watchdog
from hypermoe_ds.training.recorder import Recorder
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.step_monitor import StepMonitor
from hypermoe_ds.training.step_observer import StepObserver

if TYPE_CHECKING:  # benchmarks use this module without megatron-core
    from hypermoe_ds.training.validation import Validation


def train(
    engine: Any,
    batches: Iterator[dict[str, Tensor]],
    state: TrainState,
    last_step: int,
    recorder: Recorder,
    checkpoints: CheckpointManager,
    validate: "Callable[[], Validation] | None",
    validation_interval: int,
    skipped_samples: SkippedSamples,
    stage_start: Callable[[int], StageStart],
    step_monitor: StepMonitor,
    watchdog: Watchdog,
) -> bool:
    """Train until `last_step` or a stop signal, and return whether a signal ended the training.

    Save after the last step, and validate unless a signal ended the training. If a background save fails, save again.
    If a checkpoint is due while steps are skipped because of NaN or Inf, save after the next good step.

    Args:
        engine: the DeepSpeed engine.
        batches: this rank's micro-batches, starting at sample `state.consumed_samples`.
        state: training state; updated after each step.
        last_step: step after which this launch ends.
        recorder: logs the steps.
        checkpoints: saves the run.
        validate: runs the validation (collective); None disables it.
        validation_interval: steps between validations.
        skipped_samples: samples that the run skips.
        stage_start: returns the beginning of the data stage to which a sample belongs.
        step_monitor: synchronises and checks each step.
        watchdog: monitors the progress of this rank.
    """
    stopping = unsaved = False
    while state.step < last_step and not stopping:
        learning_rate = engine.get_lr()[0]
        recorder.begin(state.step + 1)
        watchdog.begin(state.step + 1, "beginning")
        tokens = optimizer_step(engine, batches, recorder, step_monitor.watch)
        status, first_sample = step_monitor.synchronize(), state.consumed_samples
        state.advance(skipped_samples.after(first_sample, engine.train_batch_size()), status.skipped)
        step_monitor.check(state, first_sample, status)
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
            with recorder.measure("checkpoint"):  # keep older checkpoints during bad steps
                state.data_stage = stage_start(state.consumed_samples)
                checkpoints.save(state.step, state.to_dict(), prune=not state.bad_steps)
            unsaved = False
    checkpoints.finish()
    watchdog.note_end(saved=stopping)
    return stopping


def _unchanged(loss: Tensor) -> Tensor:
    return loss


def optimizer_step(
    engine: Any,
    batches: Iterator[dict[str, Tensor]],
    observer: StepObserver,
    watch: Callable[[Tensor], Tensor] = _unchanged,
) -> int:
    """Run one optimizer step over its micro-batches.

    Args:
        engine: the DeepSpeed engine, which scales the loss, accumulates and clips gradients, and updates the weights.
        batches: this rank's micro-batches.
        observer: hooks for the parts of the step, its outputs and its gradients.
        watch: function that is called with each loss and returns the loss for the backward pass.

    Returns:
        Number of tokens in the step, over all ranks.
    """
    tokens = 0
    micro_batches = engine.gradient_accumulation_steps()
    loaded = _micro_batches(engine, batches, micro_batches)
    for number in range(1, micro_batches + 1):
        with observer.measure("data"):
            batch, share = next(loaded)
        with observer.measure("forward"):
            output = engine(
                input_ids=batch["input_ids"],
                position_ids=batch.get("position_ids"),
                shift_labels=batch["labels"],
                use_cache=False,
                output_router_logits=observer.logs,
                output_logits=False,
            )
        if share is not None:
            output.loss = output.loss + (share - 1) * output.lm_loss
            output.lm_loss = share * output.lm_loss
        with observer.measure("backward"):
            engine.backward(watch(output.loss))
        if number == micro_batches:
            observer.observe_gradients()
        with observer.measure("optimizer"):
            engine.step()
        tokens += batch["input_ids"].numel()
        observer.observe(output)
    return tokens * int(engine.dp_world_size)


def _micro_batches(
    engine: Any, batches: Iterator[dict[str, Tensor]], count: int
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Yield a step's micro-batches on the engine's device, each with the factor of its cross-entropy, or None for 1.

    If documents are masked, micro-batches have different numbers of labels, but each label must have the same weight in
    the gradient. Therefore, load all micro-batches first, count the labels of the step on all ranks (collective), and
    weight each micro-batch by its number of labels relative to the mean.
    """

    def load() -> dict[str, Tensor]:
        return {name: value.to(engine.device, non_blocking=True) for name, value in next(batches).items()}

    first = load()
    if "position_ids" not in first:
        yield first, None
        for _ in range(count - 1):
            yield load(), None
        return
    loaded = [first, *(load() for _ in range(count - 1))]
    labels = torch.stack([(batch["labels"] != IGNORED_LABEL).sum() for batch in loaded])
    total = labels.sum()
    torch.distributed.all_reduce(total)
    yield from zip(loaded, labels * count * int(engine.dp_world_size) / total, strict=True)
