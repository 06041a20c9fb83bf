"""Define the hooks through which the recorder measures and logs an optimizer step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hypermoe_ds.monitor.step_clock import Part


class StepObserver:
    """Base class for hooks that `optimizer_step` calls; its own hooks do nothing.

    Attributes:
        logs: whether this step is logged; if so, its forward passes also return router logits.
    """

    logs = False

    def measure(self, _part: Part) -> AbstractContextManager[None]:
        """Return a context manager for one part of the step."""
        return nullcontext()

    def observe(self, output: Any) -> None:
        """Process the output of a micro-batch."""

    def observe_gradients(self) -> None:
        """Process the gradients after the last backward pass and before the optimizer step."""
