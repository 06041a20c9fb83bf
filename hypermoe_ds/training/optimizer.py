"""Build AdamW's parameter groups and the learning-rate schedule."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from hypermoe_ds.training.settings import ScheduleConfig

_EMBEDDINGS_WITHOUT_DECAY = ("expert_embedding", "layer_embedding")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters into two groups: weight matrices with weight decay, and all others without it."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        groups["decay" if decays(name, parameter.ndim) else "no_decay"].append(parameter)
    return [
        {"name": "decay", "params": groups["decay"], "weight_decay": weight_decay},
        {"name": "no_decay", "params": groups["no_decay"], "weight_decay": 0.0},
    ]


def decays(name: str, dimensions: int) -> bool:
    """Return whether weight decay applies to a parameter, given its name and number of dimensions."""
    return dimensions >= 2 and not any(part in name for part in _EMBEDDINGS_WITHOUT_DECAY)


def build_schedule(optimizer: Optimizer, schedule: ScheduleConfig, steps: int) -> LRScheduler:
    """Build the learning-rate schedule for a run of `steps` optimizer steps."""
    return LambdaLR(optimizer, lambda steps_taken: schedule.factor(steps_taken + 1, steps))
