"""AdamW's parameter groups and the learning-rate schedule."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from hypermoe_ds.training.settings import ScheduleConfig

_EMBEDDINGS_WITHOUT_DECAY = ("expert_embedding", "layer_embedding")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters in weight matrices, which decay, and norms, biases and expert and layer embeddings."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        free = parameter.ndim < 2 or any(part in name for part in _EMBEDDINGS_WITHOUT_DECAY)
        groups["no_decay" if free else "decay"].append(parameter)
    return [
        {"name": "decay", "params": groups["decay"], "weight_decay": weight_decay},
        {"name": "no_decay", "params": groups["no_decay"], "weight_decay": 0.0},
    ]


def build_schedule(optimizer: Optimizer, schedule: ScheduleConfig, steps: int) -> LRScheduler:
    """The learning rate over `steps` optimizer steps, from Transformers' schedules."""
    names = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}
    specific: dict[str, dict[str, float]] = {
        "cosine": {"min_lr_rate": schedule.min_lr_ratio},
        "warmup_stable_decay": {"num_decay_steps": schedule.decay_steps, "min_lr_ratio": schedule.min_lr_ratio},
    }
    scheduler: LRScheduler = get_scheduler(
        names.get(schedule.name, schedule.name),
        optimizer,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs=specific.get(schedule.name),
    )
    return scheduler
