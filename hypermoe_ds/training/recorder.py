"""Turns a step's outputs into the records of a run."""

from typing import Any

from hypermoe_ds.monitor.console import Console, step_line
from hypermoe_ds.monitor.logger import MetricLogger
from hypermoe_ds.monitor.routing import StepMeter
from hypermoe_ds.monitor.throughput import Throughput, peak_memory_gib
from hypermoe_ds.training.evaluation import Evaluation
from hypermoe_ds.training.state import TrainState


class Recorder:
    """Logs a step every `interval` steps; nothing in between waits for the device.

    Args:
        logger: where metrics go.
        console: where lines are printed.
        interval: steps between two records; the first and last step have one too.
        steps: length of the run, for the time left.
        num_experts: N.
    """

    def __init__(self, logger: MetricLogger, console: Console, interval: int, steps: int, num_experts: int) -> None:
        self.throughput = Throughput()
        self._logger = logger
        self._console = console
        self._interval = interval
        self._steps = steps
        self._meter = StepMeter(num_experts)

    def is_due(self, step: int) -> bool:
        """Whether this step is logged, so that its forward passes must show their routing."""
        return step % self._interval == 0 or step in (1, self._steps)

    def observe(self, output: Any) -> None:
        """Take one micro-batch of a step that is logged."""
        self._meter.add(output)

    def record(self, state: TrainState, lr: float, grad_norm: float, skipped_steps: int) -> None:
        """Log the step that was just taken (collective)."""
        statistics = self._meter.read()
        tokens_per_second, seconds_per_step = self.throughput.read()
        scalars = {
            **statistics.scalars,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "peak_memory_gib": peak_memory_gib(),
            "consumed_samples": state.consumed_samples,
            "skipped_steps": skipped_steps,
        }
        seconds_left = (self._steps - state.step) * seconds_per_step
        self._console.log(step_line(state.step, self._steps, scalars, seconds_left, statistics.load_MN))
        self._logger.log(state.step, scalars, statistics.load_MN)

    def record_validation(self, step: int, result: Evaluation) -> None:
        """Log a validation."""
        line = f"loss {result.loss:.4f} | perplexity {result.perplexity:.2f} | {result.tokens:,} tokens"
        self._console.log(f"validation after step {step} | {line}")
        self._logger.log(step, {"valid_loss": result.loss, "valid_perplexity": result.perplexity})
