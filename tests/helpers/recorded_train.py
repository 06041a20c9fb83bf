"""Run pretrain/train.py and record the experts that each token selects, for `tests.helpers.routing`."""

import runpy
from pathlib import Path
from typing import Any

from hypermoe_ds.training.recorder import Recorder
from tests.helpers.routing import StepRouting, routing_of, write_routing

TRAIN = Path(__file__).parents[2] / "pretrain/train.py"


def main() -> None:
    """Patch the metrics recorder so that it also writes the routing of each step, then train."""
    observe, record = Recorder.observe, Recorder.record
    micro_batches: list[StepRouting] = []

    def observe_routing(recorder: Recorder, output: Any) -> None:
        if recorder.logs:
            micro_batches.append(routing_of(output))
        observe(recorder, output)

    def record_routing(recorder: Recorder, state: Any, *numbers: Any) -> None:
        write_routing(recorder._logger._metrics.path.parent, state.step, micro_batches)
        micro_batches.clear()
        record(recorder, state, *numbers)

    Recorder.observe, Recorder.record = observe_routing, record_routing  # type: ignore[method-assign]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
