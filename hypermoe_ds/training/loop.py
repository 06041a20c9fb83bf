"""The training loop."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.training.evaluation import Evaluation
from hypermoe_ds.training.recorder import Recorder
from hypermoe_ds.training.state import TrainState


def train(
    engine: Any,
    batches: Iterator[dict[str, Tensor]],
    state: TrainState,
    last_step: int,
    recorder: Recorder,
    checkpoints: CheckpointManager,
    validate: Callable[[], Evaluation] | None,
    validation_interval: int,
) -> None:
    """Train until `last_step`; log, validate and save when each is due, and at the end.

    Args:
        engine: the DeepSpeed engine.
        batches: this rank's micro-batches, from where `state` stands.
        state: position of the run, moved on.
        last_step: step after which this start ends.
        recorder: logs the steps.
        checkpoints: saves the run.
        validate: runs the validation (collective); None has none.
        validation_interval: steps between two validations.
    """
    while state.step < last_step:
        learning_rate = engine.get_lr()[0]
        observed = recorder.is_due(state.step + 1)
        tokens = optimizer_step(engine, batches, recorder if observed else None)
        state.advance(engine.train_batch_size())
        recorder.throughput.count(tokens)
        if observed:
            recorder.record(state, learning_rate, float(engine.get_global_grad_norm()))

        ending = state.step == last_step
        with recorder.throughput.paused():
            if validate is not None and (ending or state.step % validation_interval == 0):
                recorder.record_validation(state.step, validate())
            if ending or checkpoints.is_due(state.step):
                checkpoints.save(state.step, state.to_dict())
    checkpoints.finish()


def optimizer_step(engine: Any, batches: Iterator[dict[str, Tensor]], recorder: Recorder | None) -> int:
    """Run one optimizer step over its micro-batches.

    Args:
        engine: the DeepSpeed engine; it scales, accumulates, clips and steps.
        batches: this rank's micro-batches.
        recorder: takes the outputs of a step that is logged.

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
        engine.backward(output.loss)
        engine.step()
        tokens += batch["input_ids"].numel()
        if recorder is not None:
            recorder.observe(output)
    return tokens * int(engine.dp_world_size)
