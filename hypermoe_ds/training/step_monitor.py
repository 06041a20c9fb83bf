"""Check each optimizer step for stop signals, NaN and Inf, loss spikes and diverged replicas."""

from collections.abc import Callable, Sequence
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
    """Synchronise the status of each step across ranks and react to problems.

    The constructor is collective. It installs signal handlers, so that SIGTERM, SIGINT, SIGUSR1 and SIGHUP end the run
    after the current step instead of immediately.

    Args:
        engine: the DeepSpeed engine.
        config: training settings, including those for bad steps, skipped samples and replica checks.
        expert_parallel: number of ranks that share one copy of the experts.
        ranks: group over which the ranks exchange the status of each step.
        log: function that prints a line.
        checkpoints: the run's checkpoints, to find the last good one and to see whether a save has failed.
        describe_sample: function that describes the documents of a sample.
    """

    def __init__(
        self,
        engine: Any,
        config: TrainConfig,
        expert_parallel: int,
        ranks: ControlGroup,
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
        self._skipped_samples = SkippedSamples(config.skip_samples)
        self._ranks = ranks
        self._replicas = ReplicaCheck(engine, self._ranks, expert_parallel)
        self._spikes = SpikeDetector()
        self._losses = StepLosses()

    def watch(self, loss: Tensor) -> Tensor:
        """Record the loss of a micro-batch and return the loss for the backward pass."""
        return self._losses.add(loss)

    def synchronize(self) -> StepStatus:
        """Combine the status of the step just taken over all ranks (collective).

        Raises:
            MachineError: some ranks skipped the step and others did not.
        """
        # DeepSpeed decides from the gradient norm whether to skip a step, and the norm is the same on all ranks.
        skipped = bool(self._engine.optimizer.overflow)
        losses = self._losses.end_step()
        return all_reduce_status(self._ranks, self._signals.seen, self._checkpoints.failed, skipped, losses)

    def check(self, state: TrainState, first_sample: int, status: StepStatus) -> None:
        """Report a skipped step, a loss spike or a signal, and compare replicas if a check is due (collective).

        Args:
            state: training state after the step.
            first_sample: `consumed_samples` before the step.
            status: the result of `synchronize`.

        Raises:
            UserError: too many consecutive steps were skipped; the error names the last good checkpoint.
            MachineError: a replica of a parameter differs from the others.
        """
        if status.skipped:
            self._tolerate(state, first_sample, status.loss)
        deviations = self._spikes.deviations(status.loss)
        if deviations is not None:
            self._report_spike(state, first_sample, status.loss, deviations)
        interval = self._config.consistency_interval
        if interval is not None and state.step % interval == 0:
            self._replicas.run(state.step)
        if status.stop:
            self._log(f"received a signal: saving step {state.step}; run the same command to continue from it")

    def _tolerate(self, state: TrainState, first_sample: int, loss: float) -> None:
        """Log a skipped step, and stop the run after more than `train.max_bad_steps` skipped steps in a row."""
        samples = f"samples {first_sample} to {state.consumed_samples - 1}"
        self._log(
            f"warning: step {state.step} skipped: NaN or Inf in its loss ({loss:.4f}) or gradient; {samples}; "
            f"{state.bad_steps} in a row, {self._engine.skipped_steps} in all"
        )
        if state.bad_steps <= self._config.max_bad_steps:
            return
        good = self._checkpoints.last_good()
        again = (
            f"resume from the last good checkpoint, {good},"
            if good
            else "start a new run (there is no good checkpoint)"
        )
        if good and good != self._checkpoints.newest():
            again = f"write {good.name} into {good.parent / 'latest'} and {again}"
        raise UserError(
            f"train.max_bad_steps={self._config.max_bad_steps}",
            f"{state.bad_steps} steps in a row up to step {state.step} had a NaN or Inf in loss or gradient",
            f"{again} with a smaller optimizer.lr, or skip their data with "
            f"train.skip_samples=[[{state.good_samples}, {state.consumed_samples - 1}]]",
        )

    def _report_spike(self, state: TrainState, first_sample: int, loss: float, deviations: float) -> None:
        """Log a loss spike and the micro-batch with the largest loss (collective: every rank detects the spike)."""
        losses_of_ranks: Sequence[Sequence[float]] = self._ranks.gather(self._losses.last_step)
        worst, number, rank = max(
            (micro_loss, number, rank)
            for rank, micro_losses in enumerate(losses_of_ranks)
            for number, micro_loss in enumerate(micro_losses)
        )
        size, ranks = self._config.micro_batch_size, len(losses_of_ranks)
        sampler = ResumableSampler(state.consumed_samples, size, 0, ranks, first_sample, self._skipped_samples)
        samples = sampler.micro_batch(number, rank)
        self._log(
            f"warning: loss {loss:.4f} of step {state.step} is {deviations:.0f} robust deviations above the median; "
            f"samples {first_sample} to {state.consumed_samples - 1}, largest loss ({worst:.4f}) in "
            + ", ".join(f"{sample} ({self._describe_sample(sample)})" for sample in samples)
            + f"; set train.skip_samples=[[{samples[0]}, {samples[-1]}]] to skip these samples"
        )
