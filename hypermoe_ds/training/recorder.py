"""Measure training steps and log their metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hypermoe_ds.monitor.console import Console, step_line, validation_lines
from hypermoe_ds.monitor.flops import ModelFlops
from hypermoe_ds.monitor.logger import MetricLogger
from hypermoe_ds.monitor.losses import LossMeter
from hypermoe_ds.monitor.memory import MemoryMeter
from hypermoe_ds.monitor.routing import RoutingMeter
from hypermoe_ds.monitor.settings import MonitorConfig
from hypermoe_ds.monitor.similarity import hyper_expert_similarity
from hypermoe_ds.monitor.step_clock import Part, StepClock
from hypermoe_ds.training.norms import ParameterNorms
from hypermoe_ds.training.profiling import Profiler
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.step_observer import StepObserver

if TYPE_CHECKING:  # these modules import megatron-core, which benchmarks/train_step.py does not need
    from hypermoe_ds.data.consumption import Consumption
    from hypermoe_ds.training.validation import Validation


class Recorder(StepObserver):
    """Log steps at intervals; in all other steps, the host does not wait for the device.

    Args:
        engine: the DeepSpeed engine.
        config: logging intervals.
        steps: length of the run; the first and last steps are always logged.
        logger: writes the metrics.
        console: prints the lines.
        flops: the model's FLOPs and the GPU's peak rate.
        norms: measures gradients, weights and updates.
        consumption: counts the tokens consumed per dataset; None on ranks that do not log.
        profiler: traces steps.
    """

    def __init__(
        self,
        engine: Any,
        config: MonitorConfig,
        steps: int,
        logger: MetricLogger,
        console: Console,
        flops: ModelFlops,
        norms: ParameterNorms,
        consumption: "Consumption | None",
        profiler: Profiler,
    ) -> None:
        self.clock = StepClock()
        self._engine = engine
        self._config = config
        self._steps = steps
        self._logger = logger
        self._console = console
        self._flops = flops
        self._norms = norms
        self._consumption = consumption
        self._profiler = profiler
        self._losses = LossMeter()
        self._memory = MemoryMeter()
        self._routing = RoutingMeter(engine.module.config.num_experts)

    def begin(self, step: int) -> None:
        """Decide what to measure in a step, and start the profiler at the first step to trace."""
        self._measures_norms = self._config.norms_interval is not None and step % self._config.norms_interval == 0
        self._profiler.before_step(step)
        self.logs = self._measures_norms or step % self._config.interval == 0 or step in (1, self._steps)

    @contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Time a part of the step and label it in the trace."""
        with self.clock.measure(part), self._profiler.region(part):
            yield

    def end(self, step: int, tokens: int) -> None:
        """Count a step and its tokens over all ranks, and stop the profiler after the last step to trace."""
        self.clock.count(tokens)
        self._profiler.after_step(step)

    def observe(self, output: Any) -> None:
        """Accumulate the losses of a micro-batch and, if the step is logged, its routing statistics."""
        self._losses.add(output)
        if self.logs:
            self._routing.add(output)

    def observe_gradients(self) -> None:
        """Measure the gradients if the step is logged."""
        if self.logs:
            self._norms.add_gradients()

    def record(self, state: TrainState, lr: float) -> None:
        """Log the step that has just ended (collective).

        Args:
            state: training state after the step.
            lr: learning rate of the step.
        """
        engine, routing = self._engine, self._routing.read()
        times = self.clock.read()
        values: dict[str, float] = {
            **self._losses.read(),
            **routing.scalars,
            "lr": lr,
            "grad_norm": float(engine.get_global_grad_norm()),
            **self._norms.gradients(),
            "skipped_steps": engine.skipped_steps,
            **times,
            **self._flops.rates(times["tokens_per_second"], state.consumed_samples - 1),
            **self._memory.read(),
            "consumed_samples": state.consumed_samples,
        }
        if engine.fp16_enabled():
            values["loss_scale"] = float(engine.optimizer.loss_scale)
        if self._measures_norms:
            values |= self._similarity()
        if self._measures_norms and not state.bad_steps:  # a skipped step has no update
            values |= self._norms.weights_and_updates(lr)
        if self._consumption is not None:
            values |= self._consumption.at(state.consumed_samples)
        seconds_left = (self._steps - state.step) * times["step_seconds"]
        self._console.log(step_line(state.step, self._steps, values, seconds_left, routing.load_MN))
        self._logger.log(state.step, values, routing.load_MN)

    def record_validation(self, step: int, result: "Validation") -> None:
        """Log a validation."""
        for line in validation_lines(step, self._steps, result.values):
            self._console.log(line)
        self._logger.log(step, result.values)
        self._logger.log_samples(step, result.samples)

    def _similarity(self) -> dict[str, float]:
        model = self._engine.module.model
        if model.hypernetwork is None:
            return {}
        layers = [layer.hyper_experts for layer in model.layers if layer.is_moe]
        return hyper_expert_similarity(layers, model.hypernetwork, model.config.num_experts_per_tok)
