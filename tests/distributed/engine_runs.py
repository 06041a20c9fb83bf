"""What the ranks do: training runs through the engine."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small_runs import (
    EPSILON,
    GLOBAL_BATCH,
    LEARNING_RATE,
    SEED,
    SMALL,
    STEPS,
    WEIGHT_DECAY,
    CLIP,
    Layout,
    batches_of_rank,
    wake_hypernetwork,
)
from torch import Tensor

from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.monitor.routing import StepMeter
from hypermoe_ds.training.ds_config import merge
from hypermoe_ds.training.engine import build_engine
from hypermoe_ds.training.loop import optimizer_step
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig


def settings_of(layout: Layout) -> tuple[HyperMoEConfig, dict[str, Any], TrainConfig]:
    config = HyperMoEConfig(**{**SMALL, **layout.model})
    train = TrainConfig(
        steps=STEPS,
        micro_batch_size=layout.micro_batch,
        global_batch_size=GLOBAL_BATCH,
        seed=SEED,
        precision=layout.precision,
        clip_grad_norm=CLIP,
        activation_checkpointing=layout.checkpointing,
    )
    stage = {"zero_optimization": {"stage": layout.stage}}
    return config, merge(stage, train, config, layout.expert, layout.ranks), train


def engine_of(layout: Layout) -> Any:
    config, ds_config, train = settings_of(layout)
    optimizer = OptimizerConfig(lr=LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    return build_engine(config, ds_config, optimizer, ScheduleConfig(name="linear"), train)


class Watcher:
    """Stands where the recorder stands."""
    def __init__(self, num_experts):
        self.meter = StepMeter(num_experts)
    def observe(self, output):
        self.meter.add(output)


def train_on_rank(layout: Layout, observe: bool = True) -> dict[str, Any]:
    wake_hypernetwork()
    rank = torch.distributed.get_rank()
    engine = engine_of(layout)
    watcher = Watcher(engine.module.config.num_experts)
    batches = batches_of_rank(layout, rank)
    scalars, norms = [], []
    for _ in range(STEPS):
        optimizer_step(engine, batches, watcher)
        scalars.append(watcher.meter.read().scalars)
        norms.append(float(engine.get_global_grad_norm()))
    return {"scalars": scalars, "norms": norms, "params": {n: p.detach().clone() for n,p in engine.module.named_parameters()}}
