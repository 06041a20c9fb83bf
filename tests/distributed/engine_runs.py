"""Code that ranks run in the tests: training runs with the DeepSpeed engine."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from small_runs import (
    CLIP,
    EPSILON,
    GLOBAL_BATCH,
    LAST_RATE,
    LEARNING_RATE,
    SEED,
    STEPS,
    WEIGHT_DECAY,
    Layout,
    batches_of_rank,
    model_config,
    probe_of,
    wake_hypernetwork,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hypermoe_ds.checkpoint.engine_state import EngineState
from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.settings import CheckpointConfig
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import hyper_experts
from hypermoe_ds.monitor.losses import LossMeter
from hypermoe_ds.monitor.routing import RoutingMeter, StepStatistics
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.training.ds_config import merge
from hypermoe_ds.training.engine import build_engine
from hypermoe_ds.training.loop import optimizer_step
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig
from hypermoe_ds.training.step_observer import StepObserver
from tests.helpers.routing import StepRouting, gather_routing, routing_of


def train_config(layout: Layout, steps: int = STEPS) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        micro_batch_size=layout.micro_batch,
        global_batch_size=GLOBAL_BATCH,
        seed=SEED,
        precision=layout.precision,
        clip_grad_norm=CLIP,
        activation_checkpointing=layout.recompute,
    )


def ds_config_of(layout: Layout) -> dict[str, Any]:
    ds_json: dict[str, Any] = {"zero_optimization": {"stage": layout.stage}}
    if layout.accumulate is not None:
        ds_json["data_types"] = {"grad_accum_dtype": layout.accumulate}
    return merge(ds_json, train_config(layout), model_config(layout), layout.expert, layout.ranks)


def engine_of(layout: Layout, steps: int = STEPS) -> Any:
    """Build an engine whose learning rate falls linearly, to `LAST_RATE` times its first value at step `steps`."""
    wake_hypernetwork()
    if layout.form is not None:
        hyper_experts.cheaper_form = lambda *_: layout.form  # only affects this test process
    optimizer = OptimizerConfig(lr=LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    schedule = ScheduleConfig(name="linear", min_lr_ratio=LAST_RATE)
    train = train_config(layout, steps)
    sections = optimizer, schedule, train, ParallelConfig()
    return build_engine(model_config(layout), ds_config_of(layout), *sections, document_mask=layout.masked)


class Watcher(StepObserver):
    """Minimal stand-in for the metrics recorder, which collects only losses and routing."""

    def __init__(self, num_experts: int) -> None:
        self.logs = True
        self._losses = LossMeter()
        self._meter = RoutingMeter(num_experts)
        self._routing: list[StepRouting] = []

    def observe(self, output: Any) -> None:
        self._losses.add(output)
        self._meter.add(output)
        self._routing.append(routing_of(output))

    def read(self) -> StepStatistics:
        """Return the losses and routing statistics of the last step over all ranks (collective)."""
        routing = self._meter.read()
        return StepStatistics(self._losses.read() | routing.scalars, routing.load_MN)

    def read_routing(self) -> StepRouting:
        """Return the routing of the last step over all ranks (collective)."""
        routing = gather_routing(self._routing)
        self._routing.clear()
        return routing


@dataclass
class Step:
    """Loss, gradient norm and routing of one step."""

    loss: float
    grad_norm: float
    routing: StepRouting = field(compare=False)

    @property
    def numbers(self) -> tuple[float, float]:
        return self.loss, self.grad_norm


@dataclass
class RankRun:
    """Results of a run on one rank."""

    first_logits: Tensor
    steps: list[StepStatistics]
    grad_norms: list[float]
    routing: list[StepRouting]
    last_logits: Tensor
    parameters: dict[str, Tensor]
    router_passes: int
    hooks_left: int


def train_on_rank(layout: Layout) -> RankRun:
    """Train `STEPS` steps, and compute the logits of the rank's probe batch before and after."""
    rank = torch.distributed.get_rank()
    engine = engine_of(layout)
    routers = [module for name, module in engine.module.named_modules() if name.endswith("mlp.router")]
    hooks_before = _hooks(routers)
    passes: list[None] = []
    first_logits = logits_of(engine, rank)
    routers[0].register_forward_pre_hook(lambda _module, _inputs: passes.append(None))
    batches = batches_of_rank(layout, rank)
    watcher = Watcher(engine.module.config.num_experts)
    steps, norms, routing = [], [], []
    for _ in range(STEPS):
        optimizer_step(engine, batches, watcher)
        steps.append(watcher.read())
        routing.append(watcher.read_routing())
        norms.append(float(engine.get_global_grad_norm()))
    router_passes, hooks_left = len(passes), _hooks(routers) - hooks_before
    parameters = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    last_logits = logits_of(engine, rank)
    return RankRun(first_logits, steps, norms, routing, last_logits, parameters, router_passes, hooks_left)


def _hooks(routers: list[nn.Module]) -> int:
    return sum(len(router._forward_hooks) + len(router.gate._forward_hooks) for router in routers)


class _Operations(TorchDispatchMode):
    """Context manager that counts the PyTorch operations run inside its context."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def operations_of_a_step(layout: Layout) -> Counter[str]:
    """Count the operations of DeepSpeed's optimizer step after one micro-batch, on this rank."""
    engine = engine_of(layout)
    batch = next(batches_of_rank(layout, torch.distributed.get_rank()))
    engine.backward(engine(input_ids=batch["input_ids"], shift_labels=batch["labels"], use_cache=False).loss)
    with _Operations() as operations:
        engine.step()
    return operations.counts


@torch.no_grad()
def logits_of(engine: Any, rank: int) -> Tensor:
    engine.eval()
    logits: Tensor = engine(input_ids=probe_of(rank), use_cache=False).logits
    engine.train()
    return logits.float()


# Checkpoints

SAVED_STEP = 2


def steps_on(engine: Any, batches: Iterator[dict[str, Tensor]], count: int) -> list[Step]:
    """Train for `count` steps, and return the results of each step."""
    watcher = Watcher(engine.module.config.num_experts)
    taken = []
    for _ in range(count):
        optimizer_step(engine, batches, watcher)
        loss, norm = watcher.read().scalars["total_loss"], float(engine.get_global_grad_norm())
        taken.append(Step(loss, norm, watcher.read_routing()))
    return taken


def save_on_rank(layout: Layout, folder: Path, tokenizer: Path) -> tuple[Any, ...]:
    """Train up to `SAVED_STEP`, save a checkpoint, and train to the last step.

    Returns:
        The logits at the checkpoint, the steps after the checkpoint, and the logits after the last step.
    """
    rank = torch.distributed.get_rank()
    engine, run = engine_of(layout), RunFolder(folder)
    batches = batches_of_rank(layout, rank)
    steps_on(engine, batches, SAVED_STEP)
    checkpoints = manager_of(engine, run)
    checkpoints.save(SAVED_STEP, {"step": SAVED_STEP})
    if rank == 0:
        run.write_settings({}, ds_config_of(layout), model_config(layout), tokenizer)
    saved = logits_of(engine, rank)
    steps = steps_on(engine, batches, STEPS - SAVED_STEP)
    checkpoints.finish()
    return saved, steps, logits_of(engine, rank)


def resume_on_rank(layout: Layout, folder: Path) -> tuple[Any, ...]:
    """Resume from the checkpoint and train to the last step; return the same results as `save_on_rank`."""
    rank = torch.distributed.get_rank()
    engine = engine_of(layout)
    state = manager_of(engine, RunFolder(folder)).resume()
    assert state is not None
    batches = batches_of_rank(layout, rank)
    for _ in range(state["step"] * layout.accumulation):
        next(batches)
    loaded = logits_of(engine, rank)
    return loaded, steps_on(engine, batches, STEPS - SAVED_STEP), logits_of(engine, rank)


def resume_into_each(
    layout: Layout, folder: Path, others: list[dict[str, Any]], named: bool = True
) -> list[tuple[str, bool]]:
    """Save a model, then try to resume the checkpoint with other models.

    Args:
        layout: layout of all models.
        folder: the run folder.
        others: configuration fields of the other models.
        named: whether the checkpoint records the configuration of its model.

    Returns:
        For each other model, the error message, and whether any weight of the model changed.
    """
    if not named:
        EngineState.model = lambda _self: {}  # type: ignore[method-assign] (only affects this test process)
    checkpoints = manager_of(engine_of(layout), RunFolder(folder))
    checkpoints.save(0, {"step": 0})
    checkpoints.finish()
    found = []
    for other in others:
        engine = engine_of(replace(layout, model=other))
        before = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
        try:
            manager_of(engine, RunFolder(folder)).resume()
        except UserError as error:
            now = dict(engine.module.named_parameters())
            found.append((str(error), any(not torch.equal(before[name], now[name]) for name in before)))
    return found


def manager_of(engine: Any, run: RunFolder) -> CheckpointManager:
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[engine.module.dtype]
    run.path.mkdir(parents=True, exist_ok=True)
    return CheckpointManager(engine, run.checkpoints, CheckpointConfig(), {"train": {"precision": precision}})
