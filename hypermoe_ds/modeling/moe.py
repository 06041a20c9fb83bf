"""Mixture of Experts on one device: router, experts, MoE block and routing losses.

In training, DeepSpeed's expert-parallel layer replaces the MoE block. DeepSpeed's router has the same structure as
`TopKRouter`, so `run_observed` works with either block.

Shape legend: B batch size, S sequence length, T tokens (B * S), D hidden size, N experts, K experts per token,
F expert width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from .configuration_hypermoe import HyperMoEConfig

Result = TypeVar("Result")


class ResidualLinear(nn.Linear):
    """Linear layer that writes to the residual stream, initialised with a smaller standard deviation."""


class SwiGLU(nn.Module):
    """SwiGLU MLP of a dense layer or a shared expert: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = ResidualLinear(width, hidden_size, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x_D)) * self.up_proj(x_D))
        return output


class _Fp32Product(torch.autograd.Function):
    """Compute x W^T in fp32, but save the inputs for the backward pass in their original precision."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ND)
        return F.linear(x_TD.float(), weight_ND.float())

    @staticmethod
    def backward(ctx: Any, gradient_TN: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ND = ctx.saved_tensors
        x_gradient_TD = gradient_TN @ weight_ND.float()
        weight_gradient_ND = gradient_TN.flatten(0, -2).T @ x_TD.flatten(0, -2).float()
        return x_gradient_TD.to(x_TD.dtype), weight_gradient_ND.to(weight_ND.dtype)


class Fp32Gate(nn.Linear):
    """Router gate that computes its logits in fp32, for any dtype of the input and weight."""

    def forward(self, x_TD: Tensor) -> Tensor:
        device = x_TD.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(x_TD)
        if not self.weight.requires_grad or x_TD.dtype == self.weight.dtype == torch.float32:
            # Quantised weights also use this path, because their tensor class supports no other matrix product.
            return F.linear(x_TD.float(), self.weight.float())
        logits_TN: Tensor = _Fp32Product.apply(x_TD, self.weight)  # type: ignore[no-untyped-call]
        return logits_TN


class TopKRouter(nn.Module):
    """Route each token to the K experts with the highest probability (step 1 of docs/METHOD.md)."""

    def __init__(self, config: HyperMoEConfig) -> None:
        super().__init__()
        gate = Fp32Gate if config.router_dtype == "fp32" else nn.Linear
        self.gate = gate(config.hidden_size, config.num_experts, bias=False)
        self.top_k = config.num_experts_per_tok
        self.renormalises = config.renormalises_gates

    @property
    def weight(self) -> Tensor:
        """Weight of the gate [N, D], which DeepSpeed's AutoEP reads through this property."""
        return self.gate.weight

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select K experts for each token.

        Returns:
            gates_TK in fp32, selected_TK and logits_TN.
        """
        logits_TN = self.gate(x_TD)
        probabilities_TN = F.softmax(logits_TN.float(), dim=-1)
        gates_TK, selected_TK = torch.topk(probabilities_TN, self.top_k, dim=-1, sorted=False)
        if self.renormalises:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        return gates_TK, selected_TK, logits_TN


class _ExpertsForms(ExpertsInterface):
    """Use Transformers' grouped GEMMs under torch.compile and torch.export, and `Experts.forward` otherwise."""

    def get_interface(self, experts_implementation: str, default: Callable[..., Tensor]) -> Callable[..., Tensor]:
        grouped: Callable[..., Tensor] = self["grouped_mm"]
        return grouped if torch.compiler.is_compiling() else default


@use_experts_implementation(experts_interface=_ExpertsForms())
class Experts(nn.Module):
    """N SwiGLU experts stored in two 3-D parameters."""

    def __init__(self, config: HyperMoEConfig) -> None:
        super().__init__()
        N, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = N
        self.gate_up_proj = nn.Parameter(torch.empty(N, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(N, D, width))

    def forward(self, x_TD: Tensor, selected_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return y_TD, the gate-weighted sum of each token's expert outputs.

        If Transformers shards the experts over ranks, index N represents every expert on another rank. Rows with index
        N contribute zero.
        """
        top_k, chosen_R = selected_TK.shape[1], selected_TK.flatten()
        order_R = torch.argsort(chosen_R, stable=True)  # R = T * K rows, sorted by expert
        counts = torch.bincount(chosen_R, minlength=self.num_experts + 1).tolist()
        *groups, remote_tD = torch.split(x_TD[order_R // top_k], counts)
        outputs = []
        for x_tD, gate_up_FD, down_DF in zip(groups, self.gate_up_proj, self.down_proj, strict=True):
            outputs.append(F.linear(self._apply_gate(F.linear(x_tD, gate_up_FD)), down_DF))
        y_RD = torch.cat([*outputs, torch.zeros_like(remote_tD)])
        y_TKD = torch.empty_like(y_RD).index_copy(0, order_R, y_RD).view(-1, top_k, x_TD.shape[1])
        return (y_TKD * gates_TK.unsqueeze(-1)).sum(1).to(x_TD.dtype)

    def _apply_gate(self, gate_up_tF: Tensor) -> Tensor:
        """Return silu(gate) * up; Transformers' grouped GEMMs also call this method."""
        gate_tF, up_tF = gate_up_tF.chunk(2, dim=-1)
        return F.silu(gate_tF) * up_tF


class MoEBlock(nn.Module):
    """Router, experts and optional shared expert of one layer."""

    def __init__(self, config: HyperMoEConfig) -> None:
        super().__init__()
        self.router = TopKRouter(config)
        self.experts = Experts(config)
        shared = config.shared_expert_size
        self.shared_experts = SwiGLU(config.hidden_size, shared) if shared else None

    def forward(self, x_BSD: Tensor, on_routing: "Callable[[Routing], None] | None" = None) -> Tensor:
        """Return y_BSD, the gate-weighted sum of each token's expert outputs plus the shared expert's output.

        Args:
            x_BSD: hidden states of the tokens.
            on_routing: called as soon as the router has selected the experts.
        """
        x_TD = x_BSD.flatten(0, 1)
        gates_TK, selected_TK, logits_TN = self.router(x_TD)
        if on_routing is not None:
            on_routing(Routing(logits_TN, selected_TK, gates_TK))
        y_TD = self.experts(x_TD, selected_TK, gates_TK)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        y_BSD: Tensor = y_TD.view_as(x_BSD)
        return y_BSD


@dataclass
class Routing:
    """Output of the router of one layer in one forward pass."""

    logits_TN: Tensor
    selected_TK: Tensor
    gates_TK: Tensor | None = None


def run_observed(
    block: nn.Module, x_BSD: Tensor, on_routing: Callable[[Routing], Result]
) -> tuple[Tensor, Routing, Result]:
    """Run an MoE block and call `on_routing` when its router has selected the experts, before tokens are dispatched.

    Args:
        block: a `MoEBlock`, or the DeepSpeed layer that replaces the block.
        x_BSD: hidden states of the tokens.
        on_routing: called once, with the routing of all tokens.

    Returns:
        The output y_BSD of the block, its routing, and the result of `on_routing`.
    """
    observed: list[tuple[Routing, Result]] = []

    def observe(routing: Routing) -> None:
        observed.append((routing, on_routing(routing)))

    if isinstance(block, MoEBlock):
        y_BSD = block(x_BSD, observe)
    else:
        with observe_router(block.get_submodule("router"), observe):
            y_BSD = block(x_BSD)
    [(routing, result)] = observed
    return y_BSD, routing, result


@contextmanager
def observe_router(router: nn.Module, on_routing: Callable[[Routing], None]) -> Iterator[None]:
    """Call `on_routing` as soon as `router` has selected the experts.

    The hooks are registered for one pass only, and nothing is stored on the module. If activation checkpointing
    recomputes a pass, the recomputed pass therefore observes the same routing.
    """
    logits: list[Tensor] = []
    handles = [
        router.gate.register_forward_hook(lambda _module, _inputs, output: logits.append(output)),  # type: ignore[union-attr]
        router.register_forward_hook(
            lambda _module, _inputs, output: on_routing(
                Routing(logits.pop(), selected_TK=output[1], gates_TK=output[0])
            )
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(
    logits_TN: Tensor, selected_TK: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the Switch Transformer load-balancing loss of one layer (arXiv 2101.03961, equations 4 to 6).

    The loss is N * sum_i f_i * P_i, where f_i is the fraction of the T * K routed rows that expert i receives, and P_i
    is the mean probability of expert i. For any K, the loss is 1 if the load is balanced.

    Args:
        logits_TN: logits of the router.
        selected_TK: experts that the router selected.
        sum_over_ranks: function that sums a tensor over the data-parallel ranks, so that f_i counts the tokens of all
            ranks. The loss is linear in P_i, so the mean of the ranks' losses equals the loss of the whole batch, in
            value and gradient.
    """
    N = logits_TN.shape[-1]
    probability_N = F.softmax(logits_TN.float(), dim=-1).mean(0)
    # bincount would make the host wait for the GPU. Counts in fp32 are exact up to 2^24.
    chosen_R = selected_TK.flatten()
    count_N = torch.zeros_like(probability_N).index_add_(0, chosen_R, torch.ones_like(chosen_R, dtype=torch.float32))
    if sum_over_ranks is not None:
        count_N = sum_over_ranks(count_N)
    return N * torch.dot(count_N / count_N.sum(), probability_N)


def router_z_loss(logits_TN: Tensor) -> Tensor:
    """Return the router z-loss of one layer: the mean squared logsumexp (ST-MoE, arXiv 2202.08906, equation 5)."""
    return torch.logsumexp(logits_TN.float(), dim=-1).square().mean()
