"""Small training runs for the distributed tests, and a serial reference run on one process.

The engine is compared with the serial run: the model without expert parallelism on the full batch, PyTorch's AdamW, and
gradient clipping in plain code. The serial run uses only the model from `hypermoe_ds`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hypermoe_ds.data.loader import mask_documents
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.hyper_experts import GeneratorHead
from tests.helpers.routing import StepRouting, concatenate, routing_of

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
DOCUMENT_END = 0
STEPS = 4
GLOBAL_BATCH = 8
MOST_RANKS = 4
LEARNING_RATE = 1e-2
LAST_RATE = 0.2  # learning rate of the last step, relative to the first
WEIGHT_DECAY = 0.1
EPSILON = 1e-6  # Adam's epsilon; with a smaller value, Adam would amplify the rounding errors of gradients
CLIP = 0.8  # maximum gradient norm, which only some steps exceed
SEED = 7


@dataclass(frozen=True)
class Layout:
    """Parallel layout of a run.

    Attributes:
        ranks: number of ranks.
        expert: expert-parallel size.
        stage: ZeRO stage.
        accumulation: micro-batches per rank and step.
        recompute: whether to use activation checkpointing.
        precision: precision of weights and activations.
        accumulate: dtype in which gradients are accumulated; None selects the default.
        form: form of the HyperExperts; None selects the cheaper one, which is "factored" at these sizes.
        model: configuration fields that differ from `SMALL`.
        masked: whether to mask documents.
    """

    ranks: int = 2
    expert: int = 1
    stage: int = 1
    accumulation: int = 1
    recompute: bool = False
    precision: str = "fp32"
    accumulate: str | None = None
    form: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    masked: bool = False

    @property
    def micro_batch(self) -> int:
        """Number of sequences in one forward pass on one rank."""
        return GLOBAL_BATCH // self.accumulation // self.ranks

    @property
    def pieces(self) -> int:
        """Number of parts of the global batch; expert loads are counted per part, and losses are averaged over them."""
        per_rank = self.model.get("router_aux_loss_scope") == "micro_batch"
        return self.accumulation * (self.ranks if per_rank else 1)


def model_config(layout: Layout) -> HyperMoEConfig:
    return HyperMoEConfig(**{**SMALL, **layout.model})


def wake_hypernetwork() -> None:
    """Initialise generated weights with large values in this process.

    If these weights were tiny, the tests would not detect errors in them.
    """
    GeneratorHead.reset_parameters = nn.Linear.reset_parameters  # type: ignore[method-assign]


def random_tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def training_tokens(masked: bool = False) -> Tensor:
    """Return the token ids of all steps, [STEPS, GLOBAL_BATCH, S + 1].

    If documents are masked, about one token in 16 ends a document, so samples have different numbers of documents.
    """
    tokens = random_tokens(3, STEPS, GLOBAL_BATCH, S + 1)
    return tokens.where(tokens % 16 != 0, DOCUMENT_END) if masked else tokens


def probe_of(rank: int) -> Tensor:
    """Return the batch on which a rank computes logits.

    Each rank has a different batch, so that its routing differs.
    """
    return random_tokens(11, MOST_RANKS, 2, S)[rank]


def batches_of_rank(layout: Layout, rank: int) -> Iterator[dict[str, Tensor]]:
    """Yield the micro-batches of a rank in order."""
    for step in training_tokens(layout.masked):
        for block in step.chunk(layout.accumulation):
            own = block.chunk(layout.ranks)[rank]
            batch = {"input_ids": own[:, :-1], "labels": own[:, 1:]}
            if layout.masked:
                masked = mask_documents(own[:, :-1].numpy(), own[:, 1:].numpy(), DOCUMENT_END)
                batch["labels"], batch["position_ids"] = map(torch.from_numpy, masked)
            yield batch


# The serial reference run


@dataclass
class SerialRun:
    """Results of the serial run.

    Most lists have one item per step. Lists of logits have one item per rank, for the probe batch of that rank.
    """

    first_logits: list[Tensor]
    losses: list[float] = field(default_factory=list)
    aux_losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    loads: list[Any] = field(default_factory=list)
    routing: list[StepRouting] = field(default_factory=list)
    last_logits: list[Tensor] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def serial_run(layout: Layout) -> SerialRun:
    """Train the same model as `layout` on one process."""
    return _serial_run(layout.pieces, tuple(sorted(layout.model.items())), layout.masked)


@cache
def _serial_run(pieces: int, model: tuple[tuple[str, Any], ...], masked: bool) -> SerialRun:
    usual = GeneratorHead.reset_parameters
    wake_hypernetwork()
    torch.manual_seed(SEED)
    network = HyperMoEForCausalLM(HyperMoEConfig(**{**SMALL, **dict(model)}))
    GeneratorHead.reset_parameters = usual  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(_groups(network), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON)
    run = SerialRun(_probe(network))
    for number, step in enumerate(training_tokens(masked)):
        outputs, counts = [], []
        for piece in step.chunk(pieces):
            labels, positions = _documents(piece) if masked else (piece[:, 1:].contiguous(), None)
            counts.append((labels != -100).sum())
            outputs.append(
                network(
                    input_ids=piece[:, :-1],
                    position_ids=positions,
                    shift_labels=labels,
                    use_cache=False,
                    output_router_logits=True,
                )
            )
        share = torch.stack(counts) / sum(counts)
        routing_losses = torch.stack([output.loss - output.lm_loss for output in outputs]).mean()
        loss = (share * torch.stack([output.lm_loss for output in outputs])).sum() + routing_losses
        optimizer.zero_grad()
        loss.backward()
        run.losses.append(loss.item())
        run.aux_losses.append(torch.stack([output.aux_loss for output in outputs]).mean().item())
        run.grad_norms.append(_clip(network))
        _note_routing(run, outputs, network.config.num_experts)
        run.routing.append(concatenate([routing_of(output) for output in outputs]))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - (1 - LAST_RATE) * number / (STEPS - 1))
        optimizer.step()
    run.last_logits = _probe(network)
    run.parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return run


def _documents(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the labels and positions of masked documents, both [B, S], token by token."""
    labels, positions = tokens[:, 1:].clone(), torch.zeros_like(tokens[:, 1:])
    for row, sample in enumerate(tokens[:, :-1].tolist()):
        position = 0
        for place, token in enumerate(sample):
            positions[row, place] = position
            position += 1
            if token == DOCUMENT_END:
                labels[row, place], position = -100, 0
    return labels, positions


def _clip(network: nn.Module) -> float:
    """Scale the gradients so that their norm is at most `CLIP`; return the original norm."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, CLIP / norm))
    return norm


def _note_routing(run: SerialRun, outputs: list[Any], num_experts: int) -> None:
    """Record the mean router entropy of the first MoE layer and the expert loads of all layers over the full batch."""
    logits = np.concatenate([output.router_logits[0].detach().double().numpy() for output in outputs])
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    run.entropies.append(float(-(probabilities * np.log(probabilities)).sum(1).mean()))
    layers = zip(*(output.selected_experts for output in outputs), strict=True)
    chosen = [np.concatenate([selected.flatten().numpy() for selected in layer]) for layer in layers]
    run.loads.append(np.array([[np.mean(layer == expert) for expert in range(num_experts)] for layer in chosen]))


@torch.no_grad()
def _probe(network: HyperMoEForCausalLM) -> list[Tensor]:
    network.eval()
    logits = [network(input_ids=probe_of(rank), use_cache=False).logits for rank in range(MOST_RANKS)]
    network.train()
    return logits


def _groups(network: nn.Module) -> list[dict[str, Any]]:
    decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        free = name.endswith(("bias", "norm.weight")) or "layernorm" in name
        free = free or name.endswith(("expert_embedding.weight", "layer_embedding.weight"))
        decays[not free].append(parameter)
    return [
        {"params": decays[True], "weight_decay": WEIGHT_DECAY},
        {"params": decays[False], "weight_decay": 0.0},
    ]
