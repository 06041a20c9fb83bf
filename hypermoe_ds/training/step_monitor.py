"""What is looked at after each step: signals, numbers that went wrong, copies that differ."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.data.loader import ResumableSampler
from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.control_group import ControlGroup
from hypermoe_ds.resilience.loss_spikes import SpikeDetector
from hypermoe_ds.resilience.replicas import ReplicaCheck
from hypermoe_ds.resilience.step_status import StepLosses, StepStatus, all_reduce_status
from hypermoe_ds.resilience.stop_signals import StopSignals
from hypermoe_ds.training.settings import TrainConfig
from hypermoe_ds.training.state import TrainState


class StepMonitor:
    """Moves the run on by a step and says what all ranks know of it. Building it is collective, and from then on
    SIGTERM, SIGINT, SIGUSR1 and SIGHUP end the run after a step and not at once.

    Args:
        engine: the DeepSpeed engine.
        config: how many bad steps to bear, what to leave out, when to compare the copies.
        expert_parallel: ranks that share one copy of the experts.
        log: prints a line.
        checkpoints: name the newest one, and know whether the one being written has failed.
        origin: names the documents of a sample.
    """

    def __init__(
        self,
        engine: Any,
        config: TrainConfig,
        expert_parallel: int,
        log: Callable[[str], None],
        checkpoints: CheckpointManager,
        describe_sample: Callable[[int], str],
    ) -> None:
        self._engine = engine
        self._config = config
        self._signals = StopSignals()
        self._log = log
        self._checkpoints = checkpoints
        self._describe_sample = describe_sample
        self._left_out = SkippedSamples(config.skip_samples)
        self._ranks = ControlGroup()
        self._replicas = ReplicaCheck(engine, self._ranks, expert_parallel)
        self._spikes = SpikeDetector()
        self._losses = StepLosses()

    def watch(self, loss: Tensor) -> Tensor:
        """Take the loss of a micro-batch; gives back what to run the backward pass from."""
        return self._losses.add(loss)

    def after_step(self, state: TrainState) -> StepStatus:
        """Move `state` on by the step just taken; tells what all ranks know of it (collective).

        Raises:
            UserError: too many steps in a row were skipped; names the last good checkpoint, all of which is read.
            MachineError: a copy of a parameter differs from the others.
        """
        losses = self._losses.take()
        # DeepSpeed skips by the norm of the gradient, which all ranks have.
        skipped = bool(self._engine.optimizer.overflow)
        status = all_reduce_status(self._ranks, self._signals.seen, self._checkpoints.failed, skipped, losses)
        first = state.consumed_samples
        state.advance(self._left_out.after(first, self._engine.train_batch_size()), status.skipped)
        if status.skipped:
            self._tolerate(state, first, status.loss)
        deviations = self._spikes.deviations(status.loss)
        if deviations is not None:
            self._report_spike(state, first, status.loss, deviations, losses)
        interval = self._config.consistency_interval
        if interval is not None and state.step % interval == 0:
            self._replicas.run(state.step)
        if status.stop:
            self._log(f"a signal asks for the end: saving step {state.step}; the same command goes on from it")
        return status

    def _tolerate(self, state: TrainState, first: int, loss: float) -> None:
        samples = f"samples {first} to {state.consumed_samples - 1}"
        self._log(
            f"warning: step {state.step} skipped: NaN or Inf in its loss ({loss:.4f}) or gradient; {samples}; "
            f"{state.bad_steps} in a row, {self._engine.skipped_steps} in all"
        )
        if state.bad_steps > self._config.max_bad_steps:
            good = self._checkpoints.last_good()
            again = f"go on from the last good checkpoint, {good}," if good else "start again (no good checkpoint)"
            if good and good != self._checkpoints.newest():
                again = f"write {good.name} into {good.parent / 'latest'} and {again}"
            raise UserError(
                f"train.max_bad_steps={self._config.max_bad_steps}",
                f"{state.bad_steps} steps in a row up to step {state.step} had a NaN or Inf in loss or gradient",
                f"{again} with a smaller optimizer.lr, or leave out their data with "
                f"train.skip_samples=[[{state.good_samples}, {state.consumed_samples - 1}]]",
            )

    def _report_spike(self, state: TrainState, first: int, loss: float, deviations: float, losses: list[float]) -> None:
        """All ranks see the spike, so they can tell each other which micro-batch it was."""
        of_ranks = self._ranks.gather(losses)
        worst, number, rank = max((loss, n, r) for r, losses in enumerate(of_ranks) for n, loss in enumerate(losses))
        order = ResumableSampler(
            state.consumed_samples, self._config.micro_batch_size, 0, len(of_ranks), first, self._left_out
        )
        samples = order.micro_batch(number, rank)
        self._log(
            f"warning: loss {loss:.4f} of step {state.step} is {deviations:.0f} robust deviations above the median; "
            f"samples {first} to {state.consumed_samples - 1}, most ({worst:.4f}) in "
            + ", ".join(f"{sample} ({self._describe_sample(sample)})" for sample in samples)
            + f"; train.skip_samples=[[{samples[0]}, {samples[-1]}]] leaves these out"
        )
