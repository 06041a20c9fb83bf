"""pretrain/train.py whose ranks also write down which experts each token chose, for `tests.helpers.routing`."""

import runpy
from pathlib import Path
from typing import Any

from hypermoe_ds.training.recorder import Recorder
from tests.helpers.routing import StepRouting, routing_of, write_routing

TRAIN = Path(__file__).parents[2] / "pretrain/train.py"


def main() -> None:
    """Let the recorder of each rank see twice what it sees, then train."""
    observe, record = Recorder.observe, Recorder.record
    seen: list[StepRouting] = []

    def observe_too(recorder: Recorder, output: Any) -> None:
        if recorder.logs:
            seen.append(routing_of(output))
        observe(recorder, output)

    def record_too(recorder: Recorder, state: Any, *numbers: Any) -> None:
        write_routing(recorder._logger._metrics.path.parent, state.step, seen)
        seen.clear()
        record(recorder, state, *numbers)

    Recorder.observe, Recorder.record = observe_too, record_too  # type: ignore[method-assign]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
