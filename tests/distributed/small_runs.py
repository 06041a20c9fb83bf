"""Small training runs for the tests of the ranks: on ranks through the engine, and written out plainly on one process.

The plain one is what the engine is compared with: the unconverted model on the whole batch, PyTorch's
AdamW, gradients clipped by hand. It calls nothing of `hypermoe_ds` but the model itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.hyper_experts import GeneratorHead

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "first_dense_layers": 1,
    "moe_intermediate_size": 24,
    "shared_expert_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.1,
    "router_aux_loss_scope": "data_parallel",
    "z_loss_coef": 0.01,
    "expert_embedding_size": 8,
    "selection_hidden_size": 8,
    "hypernetwork_input_size": 8,
    "layer_embedding_size": 4,
    "bottleneck_size": 8,
    "adapter_size": 8,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
}
S = 32
STEPS = 4
GLOBAL_BATCH = 8
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
EPSILON = 1e-6  # above the rounding of the gradients, which Adam would else magnify
CLIP = 0.5
SEED = 7


@dataclass(frozen=True)
class Layout:
    """How a run is spread.

    Attributes:
        ranks: number of ranks.
        expert: ranks that share the experts.
        stage: ZeRO stage.
        accumulation: micro-batches of a rank in a step.
        checkpointing: activations are recomputed.
        model: fields of the model that differ from `SMALL`.
    """

    ranks: int = 2
    expert: int = 1
    stage: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"

    @property
    def micro_batch(self) -> int:
        return GLOBAL_BATCH // self.accumulation // self.ranks


def wake_hypernetwork() -> None:
    """In this process the generated weights start large: near zero, errors in them would not show."""
    GeneratorHead.reset_parameters = nn.Linear.reset_parameters  # type: ignore[method-assign]


def all_tokens() -> Tensor:
    """[STEPS, GLOBAL_BATCH, S + 1]."""
    return torch.randint(0, SMALL["vocab_size"], (STEPS, GLOBAL_BATCH, S + 1), generator=torch.Generator().manual_seed(3))


def batches_of_rank(layout: Layout, rank: int) -> Iterator[dict[str, Tensor]]:
    """A rank's micro-batches, step after step."""
    for step in all_tokens():
        for block in step.chunk(layout.accumulation):
            own = block.chunk(layout.ranks)[rank]
            yield {"input_ids": own[:, :-1], "labels": own[:, 1:]}


# The plain run


@dataclass
class PlainRun:
    losses: list[float]
    aux_losses: list[float]
    grad_norms: list[float]
    model: HyperMoEForCausalLM


def plain_run(pieces: int, **model: Any) -> PlainRun:
    """Train on one process.

    Args:
        pieces: the loss of a step is the mean over so many equal parts of its batch.
        model: fields that differ from `SMALL`.
    """
    wake_hypernetwork()
    torch.manual_seed(SEED)
    network = HyperMoEForCausalLM(HyperMoEConfig(**{**SMALL, **model}))
    optimizer = torch.optim.AdamW(_groups(network), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON)
    run = PlainRun([], [], [], network)
    for number, step in enumerate(all_tokens()):
        outputs = [
            network(input_ids=piece[:, :-1], shift_labels=piece[:, 1:].contiguous(), use_cache=False)
            for piece in step.chunk(pieces)
        ]
        loss = torch.stack([output.loss for output in outputs]).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIP / norm))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - number / STEPS)
        optimizer.step()
        run.losses.append(loss.item())
        run.aux_losses.append(torch.stack([output.aux_loss for output in outputs]).mean().item())
        run.grad_norms.append(norm)
    return run


def _groups(network: nn.Module) -> list[dict[str, Any]]:
    decays = {True: [], False: []}
    for name, parameter in network.named_parameters():
        free = name.endswith(("bias", "norm.weight")) or "layernorm" in name
        free = free or name.endswith(("expert_embedding.weight", "layer_embedding.weight"))
        decays[not free].append(parameter)
    return [
        {"params": decays[True], "weight_decay": WEIGHT_DECAY},
        {"params": decays[False], "weight_decay": 0.0},
    ]
