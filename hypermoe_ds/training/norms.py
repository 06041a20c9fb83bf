"""Measure norms of gradients, weights and updates by parameter group.

Each rank measures the ranges whose optimizer state it owns. Over all ranks, these ranges cover every element exactly
once. The norms are therefore computed from a sum of squares over ranks, without gathering gradients or weights.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from hypermoe_ds.checkpoint.engine_state import EngineState
from hypermoe_ds.checkpoint.shards import MOMENTS, WEIGHT
from hypermoe_ds.monitor.metrics import PARAMETER_GROUPS
from hypermoe_ds.training.optimizer import decays
from hypermoe_ds.training.settings import OptimizerConfig


def group_of(name: str) -> str:
    """Return the group of a parameter: experts, hypernetwork, routers or rest."""
    if ".hyper_experts." in name or ".hypernetwork." in name:  # includes the encoders' expert embeddings
        return "hypernetwork"
    if ".mlp.experts." in name:
        return "experts"
    return "routers" if ".mlp.router." in name else "rest"


class ParameterNorms:
    """Measure norms by parameter group.

    Args:
        engine: a DeepSpeed engine with AdamW.
        config: AdamW's betas, eps and weight decay.
    """

    def __init__(self, engine: Any, config: OptimizerConfig) -> None:
        self._engine = engine
        self._config = config
        self._state = EngineState(engine)
        self._groups = {name: group_of(name) for name in self._state.slices}
        self._gradients: Tensor | None = None

    def add_gradients(self) -> None:
        """Measure this rank's gradients, after the last backward pass and before the optimizer step."""
        scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0))
        self._gradients = self._squares(self._state.gradients()) / scale**2

    def gradients(self) -> dict[str, float]:
        """Return the gradient norm of each group as `grad_norm/GROUP` (collective).

        The gradients are unscaled and not yet clipped.
        """
        squares, self._gradients = self._gradients, None
        if squares is None:
            raise ValueError("add_gradients was not called in this step")
        return self._by_group("grad_norm", _sum_over_ranks(squares).sqrt())

    def weights_and_updates(self, lr: float) -> dict[str, float]:
        """Return `parameter_norm/GROUP` and `update_ratio/GROUP` of the last step (collective).

        Updates are recomputed from AdamW's moments (arXiv 1711.05101, algorithm 2), so no copy of the previous weights
        is needed.

        Args:
            lr: learning rate of the step.
        """
        weights = self._squares(self._parts(WEIGHT))
        updates = self._squares(self._updates(lr))
        weight_norms, update_norms = _sum_over_ranks(torch.stack([weights, updates])).sqrt()
        ratios = update_norms / weight_norms.clamp_min(1e-20)
        return self._by_group("parameter_norm", weight_norms) | self._by_group("update_ratio", ratios)

    def _parts(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        prefix = f"{kind}/"
        return ((key.removeprefix(prefix), part) for key, part in self._state.tensors() if key.startswith(prefix))

    def _updates(self, lr: float) -> Iterator[tuple[str, Tensor]]:
        config, steps = self._config, self._state.optimizer_steps
        kinds = (self._parts(kind) for kind in (WEIGHT, *MOMENTS))
        for (name, weight), (_, first), (_, second) in zip(*kinds, strict=True):
            denominator = (second / (1 - config.beta2**steps)).sqrt_().add_(config.eps)
            adam = (first / (1 - config.beta1**steps)).div_(denominator).mul_(lr)
            if decays(name, len(self._state.slices[name].shape)):
                decay = lr * config.weight_decay
                before = (weight + adam) / (1 - decay)
                adam.add_(before, alpha=decay)
            yield name, adam

    def _squares(self, parts: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Return this rank's sum of squares per group, computed on the device while the host continues."""
        squares = torch.zeros(len(PARAMETER_GROUPS), dtype=torch.float64, device=self._engine.device)
        for name, part in parts:
            norm = torch.linalg.vector_norm(part, dtype=torch.float32).to(squares.device, torch.float64)
            squares[PARAMETER_GROUPS.index(self._groups[name])] += norm.square()
        return squares

    def _by_group(self, metric: str, norms: Tensor) -> dict[str, float]:
        """Return the norms by metric name, for the groups that have parameters."""
        present = set(self._groups.values())
        values = zip(PARAMETER_GROUPS, norms.tolist(), strict=True)
        return {f"{metric}/{group}": value for group, value in values if group in present}


def _sum_over_ranks(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values)
    return values
