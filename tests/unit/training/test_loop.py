"""Test the training loop and the recorder with fakes for everything around them."""

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hypermoe_ds.data.skipped_samples import SkippedSamples
from hypermoe_ds.data.stage_start import StageStart
from hypermoe_ds.monitor.console import Console
from hypermoe_ds.monitor.flops import ModelFlops
from hypermoe_ds.monitor.logger import MetricLogger
from hypermoe_ds.monitor.settings import MonitorConfig
from hypermoe_ds.resilience.step_status import StepStatus
from hypermoe_ds.training.loop import optimizer_step, train
from hypermoe_ds.training.profiling import Profiler
from hypermoe_ds.training.recorder import Recorder
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.validation import Validation

B, S, ACCUMULATION, RANKS = 2, 5, 3, 4


class Engine:
    """Fake engine that records its calls."""

    device = torch.device("cpu")
    dp_world_size = RANKS

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.batches: list[Tensor] = []
        self.steps = 0

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        shift_labels: Tensor,
        use_cache: bool,
        output_router_logits: bool,
        output_logits: bool,
    ) -> Any:
        assert position_ids is None, "documents are not masked"
        assert not use_cache
        assert not output_logits
        self.calls.append("forward, observed" if output_router_logits else "forward")
        self.batches.append(input_ids)
        assert torch.equal(shift_labels, input_ids + 1)
        return SimpleNamespace(loss="loss")

    def backward(self, loss: str) -> None:
        self.calls.append(f"backward of {loss}")

    @property
    def skipped_steps(self) -> int:
        return 3

    def step(self) -> None:
        self.calls.append("step")
        self.steps += 1

    def gradient_accumulation_steps(self) -> int:
        return ACCUMULATION

    def train_batch_size(self) -> int:
        return B * ACCUMULATION * RANKS

    def get_lr(self) -> list[float]:
        return [0.1 * (self.steps // ACCUMULATION)]

    def get_global_grad_norm(self) -> Tensor:
        return torch.tensor(2.5)


def batches() -> Iterator[dict[str, Tensor]]:
    number = 0
    while True:
        ids = torch.full((B, S), number)
        yield {"input_ids": ids, "labels": ids + 1}
        number += 1


class EventLog:
    """Fake for the recorder, the clock and the validation, which lists the events of a run."""

    def __init__(self, logged: set[int], saved: set[int]) -> None:
        self.events: list[Any] = []
        self.tokens: list[int] = []
        self.clock = self
        self.logs = False
        self._logged, self._saved = logged, saved
        self.clock_runs = True

    def end(self, step: int, tokens: int) -> None:
        self.tokens.append(tokens)

    @contextmanager
    def excluded(self) -> Iterator[None]:
        self.clock_runs = False
        yield
        self.clock_runs = True

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        self.part = part
        yield
        self.part = ""

    def begin(self, step: int) -> None:
        self.logs = step in self._logged

    def observe(self, output: Any) -> None:
        if self.logs:
            self.events.append("observed")

    def observe_gradients(self) -> None:
        self.events += ["gradients"] * self.logs

    def record(self, state: TrainState, lr: float) -> None:
        self.events.append((state.step, state.consumed_samples, lr))

    def validate(self) -> Validation:
        assert not self.clock_runs
        return Validation({"valid_loss": 1.0}, [])

    def record_validation(self, step: int, result: Validation) -> None:
        self.events.append(f"validated {step}")


class Checkpoints:
    def __init__(self, event_log: EventLog, due: set[int]) -> None:
        self._event_log, self._due = event_log, due

    def is_due(self, step: int) -> bool:
        return step in self._due

    def save(self, step: int, state: dict[str, Any], prune: bool) -> None:
        assert self._event_log.part == "checkpoint"
        assert state["step"] == step
        self._event_log.events.append(f"saved {step}" + ", none removed" * (not prune))

    def finish(self) -> None:
        self._event_log.events.append("on disk")


class StepMonitor:
    """Fake step monitor that reports a stop signal, an unsaved checkpoint or a skipped step at given steps."""

    def __init__(
        self, step: int, signal_in: int | None = None, unsaved_in: int | None = None, skipped: Container[int] = ()
    ) -> None:
        self._step = step
        self._signal_in = signal_in
        self._unsaved_in = unsaved_in
        self._skipped = skipped

    def watch(self, loss: str) -> str:
        return f"watched {loss}"

    def synchronize(self) -> StepStatus:
        self._step += 1
        skipped = self._step in self._skipped
        return StepStatus(self._step == self._signal_in, self._step == self._unsaved_in, skipped, loss=1.0)

    def check(self, state: TrainState, first_sample: int, status: StepStatus) -> None:
        assert state.step == self._step
        assert state.consumed_samples - first_sample == B * ACCUMULATION * RANKS
        assert (state.bad_steps > 0) == status.skipped


class Watchdog:
    def __init__(self) -> None:
        self.begun: list[tuple[int, str]] = []
        self.saved: bool | None = None

    def begin(self, step: int, doing: str) -> None:
        self.begun.append((step, doing))

    def note_end(self, saved: bool) -> None:
        self.saved = saved


def run(
    first: int,
    last: int,
    validates: bool = True,
    signal_in: int | None = None,
    unsaved_in: int | None = None,
    skipped: Container[int] = (),
) -> tuple[EventLog, TrainState, Engine]:
    event_log, engine = EventLog(logged={1, 4}, saved=set()), Engine()
    samples = B * ACCUMULATION * RANKS
    state = TrainState(step=first, consumed_samples=first * samples)
    watchdog = Watchdog()
    stopped = train(
        engine=engine, batches=batches(), state=state, last_step=last, recorder=event_log,  # type: ignore[arg-type]
        checkpoints=Checkpoints(event_log, {3}), validate=event_log.validate if validates else None,  # type: ignore[arg-type]
        validation_interval=2, skipped_samples=SkippedSamples(),
        stage_start=lambda index: StageStart(index, 0, 1, 1, {}, {}),
        step_monitor=StepMonitor(first, signal_in, unsaved_in, skipped), watchdog=watchdog,  # type: ignore[arg-type]
    )  # fmt: skip
    assert stopped == watchdog.saved == (state.step < last)
    assert state.data_stage is None or state.data_stage.first == state.consumed_samples
    forwards = [step for step, doing in watchdog.begun if doing == "beginning"]
    assert forwards == list(range(first + 1, state.step + 1))
    return event_log, state, engine


def test_steps_are_logged_validated_and_saved_when_due_and_at_the_end() -> None:
    event_log, state, _ = run(0, 5)
    samples = B * ACCUMULATION * RANKS
    assert [event for event in event_log.events if event not in ("observed", "gradients")] == [
        (1, samples, 0.0),
        "validated 2",
        "saved 3",
        (4, 4 * samples, pytest.approx(0.3)),
        "validated 4",
        "validated 5",
        "saved 5",
        "on disk",
    ]
    assert (state.step, state.consumed_samples) == (5, 5 * samples)
    assert event_log.tokens == [B * S * ACCUMULATION * RANKS] * 5


def test_resumed_run_continues_from_its_step_and_finished_run_does_nothing() -> None:
    event_log, state, engine = run(3, 4, validates=False)
    assert event_log.events[-2:] == ["saved 4", "on disk"]
    assert not any("validated" in str(event) for event in event_log.events)
    assert (state.step, engine.steps) == (4, ACCUMULATION)
    event_log, state, engine = run(4, 4)
    assert (event_log.events, state.step, engine.calls) == (["on disk"], 4, [])


def test_signal_ends_the_run_after_the_step_with_a_checkpoint_but_no_validation() -> None:
    event_log, state, _ = run(0, 5, signal_in=2)
    assert [event for event in event_log.events if event not in ("observed", "gradients")][1:] == ["saved 2", "on disk"]
    assert state.step == 2


def test_failed_checkpoint_is_written_after_the_next_step() -> None:
    event_log, _, _ = run(0, 5, validates=False, unsaved_in=4)
    assert [event for event in event_log.events if "saved" in str(event)] == ["saved 3", "saved 4", "saved 5"]


@pytest.mark.parametrize(
    ("skipped", "unsaved_in", "saved"),
    [
        ({3}, None, ["saved 4", "saved 5"]),
        ({2, 3, 4}, None, ["saved 5"]),
        ({4}, 4, ["saved 3", "saved 5"]),
        ({1, 2}, None, ["saved 3", "saved 5"]),
        ({3, 4, 5}, None, ["saved 5, none removed"]),
    ],
)
def test_checkpoint_due_during_bad_steps_is_written_after_the_next_good_step(
    skipped: set[int], unsaved_in: int | None, saved: list[str]
) -> None:
    event_log, _, _ = run(0, 5, validates=False, unsaved_in=unsaved_in, skipped=skipped)
    assert [event for event in event_log.events if "saved" in str(event)] == saved


def test_signal_in_the_last_step_changes_nothing() -> None:
    assert run(0, 5, signal_in=5)[0].events == run(0, 5)[0].events


@pytest.mark.parametrize("observed", [False, True])
def test_each_micro_batch_has_one_forward_backward_and_step(observed: bool) -> None:
    engine, event_log = Engine(), EventLog({1}, set())
    event_log.begin(1 if observed else 2)
    tokens = optimizer_step(engine, batches(), event_log, StepMonitor(0).watch)  # type: ignore[arg-type]
    forward = "forward, observed" if observed else "forward"
    assert engine.calls == [forward, "backward of watched loss", "step"] * ACCUMULATION
    assert [int(batch[0, 0]) for batch in engine.batches] == [0, 1, 2]
    expected = ["observed"] * (ACCUMULATION - 1) + ["gradients", "observed"]
    assert event_log.events == expected * observed
    assert tokens == B * S * ACCUMULATION * RANKS


class RecordingConsole(Console):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


class StepEngine:
    """Fake engine with the attributes that the recorder reads."""

    module = SimpleNamespace(
        config=SimpleNamespace(num_experts=2), model=SimpleNamespace(hypernetwork=None, layers=[], config=None)
    )
    optimizer = SimpleNamespace(loss_scale=256.0)
    skipped_steps = 3

    def __init__(self, fp16: bool = False) -> None:
        self._fp16 = fp16

    def fp16_enabled(self) -> bool:
        return self._fp16

    def get_global_grad_norm(self) -> Tensor:
        return torch.tensor(0.25)


class Norms:
    """Fake for the object that measures norms of gradients, weights and updates."""

    def add_gradients(self) -> None:
        self.added = True

    def gradients(self) -> dict[str, float]:
        assert self.added
        return {"grad_norm/experts": 0.5}

    def weights_and_updates(self, lr: float) -> dict[str, float]:
        return {"update_ratio/experts": lr}


def recorder_of(folder: Path, fp16: bool = False, **config: Any) -> tuple[Recorder, RecordingConsole]:
    settings, console = MonitorConfig(**config), RecordingConsole()
    logger = MetricLogger(settings, folder, 0, 0)
    consumption = SimpleNamespace(at=lambda samples: {"consumed_tokens": 10 * samples})
    flops = ModelFlops(lambda _: 1000, 2, None, None)
    profiler = Profiler(settings, folder, 0, torch.nn.Identity(), console.log)
    recorder = Recorder(StepEngine(fp16), settings, 10, logger, console, flops, Norms(), consumption, profiler)  # type: ignore[arg-type]
    return recorder, console


def micro_batch(loss: float) -> Any:
    value = torch.tensor(loss)
    return SimpleNamespace(
        loss=value, lm_loss=value, aux_loss=value, z_loss=value, hyper_expert_norms=None,
        router_logits=(torch.zeros(3, 2),), selected_experts=(torch.tensor([[0], [1], [1]]),),
    )  # fmt: skip


def take(recorder: Recorder, step: int, *losses: float, bad_steps: int = 0) -> None:
    recorder.begin(step)
    for loss in losses:
        recorder.observe(micro_batch(loss))
    recorder.observe_gradients()
    recorder.end(step, 100)
    if recorder.logs:
        recorder.record(TrainState(step=step, consumed_samples=8 * step, bad_steps=bad_steps), lr=0.5)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("norms_interval", "logged"), [(None, [1, 4, 8, 10]), (3, [1, 3, 4, 6, 8, 9, 10])])
def test_first_and_last_steps_and_both_intervals_are_logged(
    tmp_path: Path, norms_interval: int | None, logged: list[int]
) -> None:
    recorder, console = recorder_of(tmp_path, interval=4, norms_interval=norms_interval, tensorboard=False)
    for step in range(1, 11):
        take(recorder, step, 1.0)
    assert [record["step"] for record in records(tmp_path)] == logged
    assert len(console.lines) == len(logged)
    measured = [record["step"] for record in records(tmp_path) if "update_ratio/experts" in record]
    assert measured == ([] if norms_interval is None else [3, 6, 9])


def test_record_has_the_mean_loss_since_the_previous_record(tmp_path: Path) -> None:
    recorder, _ = recorder_of(tmp_path, interval=3, norms_interval=None, tensorboard=False)
    for step in range(1, 7):
        take(recorder, step, float(step), step + 1.0)
    assert [record["loss"] for record in records(tmp_path)] == [1.5, (2.5 + 3.5) / 2, (4.5 + 5.5 + 6.5) / 3]


def test_record_has_the_values_of_all_meters(tmp_path: Path) -> None:
    recorder, _ = recorder_of(tmp_path, fp16=True, interval=1, norms_interval=2)
    take(recorder, 1, 2.0)
    take(recorder, 2, 2.0, bad_steps=1)
    first, skipped = records(tmp_path)
    expected = {
        "step": 1, "loss": 2.0, "lr": 0.5, "grad_norm": 0.25, "grad_norm/experts": 0.5, "skipped_steps": 3,
        "loss_scale": 256.0, "consumed_samples": 8, "consumed_tokens": 80, "experts_without_tokens/moe_layer_0": 0,
        "expert_load/moe_layer_0": [0.33333, 0.66667],
    }  # fmt: skip
    assert first.items() >= expected.items()
    assert {"time", "step_seconds/forward", "tokens_per_second_per_gpu", "peak_memory_gib"} <= first.keys()
    assert "update_ratio/experts" not in skipped, "a skipped step has no update"


def test_validation_is_logged_as_a_record_lines_and_samples(tmp_path: Path) -> None:
    recorder, console = recorder_of(tmp_path, tensorboard=False)
    values = {
        "valid_loss": 2.0, "valid_perplexity": 7.389, "valid_loss/a": 1.5, "valid_perplexity/a": 4.48,
        "valid_loss/long": 2.5, "valid_perplexity/long": 12.18, "valid_bits_per_byte/long": 0.5,
        "hyper_expert_contribution": 0.25,
    }  # fmt: skip
    recorder.record_validation(7, Validation(values, [("Once", " upon")]))
    [record] = records(tmp_path)
    assert record.items() >= {"step": 7, **values}.items()
    assert [line.partition("  ")[2] for line in console.lines] == [
        "step  7/10  valid a     loss  1.5000  perplexity    4.480",
        "step  7/10  valid long  loss  2.5000  perplexity   12.180  0.5000 bits/byte",
        "step  7/10  valid all   loss  2.0000  perplexity    7.389  HyperExperts contribute +0.2500",
    ]
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"step": 7, "prompt": "Once", "text": " upon"}


# The position of a run


def test_position_is_saved_and_restored_also_from_older_checkpoints() -> None:
    state = TrainState()
    for step in range(3):
        state.advance(8 * (step + 1), skipped=step > 0)
    state.data_stage = StageStart(0, 1, 64, 1, {"a": 1.0}, {})
    saved = state.to_dict()
    stage = {
        "first": 0, "seed": 1, "sequence_length": 64, "indices_per_sample": 1, "weights": {"a": 1.0}, "consumed": {}
    }  # fmt: skip
    assert saved == {"step": 3, "consumed_samples": 24, "data_stage": stage, "bad_steps": 2, "good_samples": 8}
    assert TrainState.from_dict(saved) == state
    del saved["good_samples"]
    assert TrainState.from_dict({}) == TrainState()
    assert TrainState.from_dict(saved).good_samples == 24, (
        "older checkpoints do not store it, so the consumed samples are used"
    )
