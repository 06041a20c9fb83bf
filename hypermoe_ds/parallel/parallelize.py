"""Turn a single-device model into a DeepSpeed engine that trains on all ranks."""

import io
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hypermoe_ds.parallel.expert_parallel import sum_over_ranks
from hypermoe_ds.parallel.overlap import overlap_hyper_experts


def parallelize(
    model: Any,
    ds_config: dict[str, Any],
    parameter_groups: list[dict[str, Any]],
    optimizer: Callable[[list[dict[str, Any]]], Optimizer],
    scheduler: Callable[[Optimizer], LRScheduler],
    activation_checkpointing: bool,
    overlap: bool,
) -> deepspeed.DeepSpeedEngine:
    """Parallelise a model in these steps (collective):

    1. Make the load-balancing loss count the tokens of all ranks, if configured.
    2. Enable the recomputation of layers in the backward pass, if `activation_checkpointing` is set.
    3. Let DeepSpeed replace each MoE block with an expert-parallel layer (AutoEP) and partition the states (ZeRO).
    4. Give the expert-parallel routers the gate class of the model, which computes logits in fp32 if configured.
    5. Make ZeRO 1 and 2 check all gradients for NaN and infinity at once.
    6. Enable a separate CUDA stream for HyperExperts, if `overlap` is set.

    Args:
        model: a `HyperMoEForCausalLM`, identical on every rank.
        ds_config: the DeepSpeed configuration.
        parameter_groups: the model's parameters, grouped by optimizer settings.
        optimizer: function that builds the optimizer; called after DeepSpeed has replaced the MoE blocks.
        scheduler: function that builds the learning-rate schedule.
        activation_checkpointing: whether to recompute layers.
        overlap: whether HyperExperts overlap with the all-to-all on GPUs.
    """
    if model.config.router_aux_loss_scope == "data_parallel":
        model.sum_over_ranks = sum_over_ranks
    gates = {type(module.gate) for name, module in model.named_modules() if name.endswith(".mlp.router")}
    if activation_checkpointing:
        model.activation_checkpointing_enable()
    with redirect_stdout(io.StringIO()):  # BF16_Optimizer prints about 25 lines about memory use
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=ds_config,
        )
    for gate in gates:
        _replace_gates(model, gate)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        engine.optimizer.has_overflow_partitioned_grads_serial = partial(has_invalid_gradient, engine.optimizer)
    overlap_hyper_experts(model, overlap)
    return engine


def _replace_gates(model: nn.Module, gate: type[nn.Linear]) -> None:
    """Change the class of the gates in AutoEP's routers, but keep parameters, names and DeepSpeed's hooks."""
    for module in model.modules():
        if isinstance(module, TokenChoiceTopKRouter):
            module.gate.__class__ = gate


def has_invalid_gradient(optimizer: DeepSpeedZeroOptimizer) -> Tensor:
    """Return whether any gradient on this rank contains NaN or infinity, as a tensor [1].

    DeepSpeed 0.19.8's own method launches 14 kernels per gradient, which took 36 ms per step for 193 gradients on an
    H100.
    """
    gradients = [grad for grads in optimizer.averaged_gradients.values() for grad in grads if grad.numel()]
    return ~torch.isfinite(get_total_norm(gradients, math.inf)).view(1)
