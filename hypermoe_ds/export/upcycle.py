"""Convert a dense model to a Mixture of Experts that computes the same function (sparse upcycling, arXiv 2212.05055).

Each expert starts as a copy of the dense MLP, or of one of its G equal slices. The layer's output does not change:

- K > 1: a token's gates sum to one (`norm_topk_prob`) and all experts are equal, so the weighted sum of the experts'
  outputs is the MLP's output for any routing. With G slices, the G adjacent experts that form one MLP share the same
  router row. A token therefore selects them together (virtual groups, arXiv 2410.07524), each with 1 / G of the group's
  gate, and the down projections start G times as large to compensate.
- K = 1: the gate is the router's probability p. The router starts so small that p is within about 1e-4 of 1 / N, and
  the down projections start N times as large to compensate. The selected expert depends only on the direction of the
  router's rows, so the expert loads are the same as with a larger router. A router this small is unstable in the first
  steps. A larger router (`router_std`) is more stable, but changes the function more.

Shape legend: D hidden size, N experts, G slices, F width of an expert.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.expert_layout import join_gate_up
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig

_ROUTER_STD_OF_ONE_EXPERT = 1e-4


@dataclass(frozen=True)
class Upcycling:
    """Upcycling settings.

    Args:
        experts: N.
        top_k: K.
        granularity: G, number of slices per MLP.
        noise: standard deviation of the normal noise added to the experts' weights, relative to that of the dense
            tensor.
        seed: seed for the router, the noise and the HyperExperts.
        router_std: standard deviation of the router's logits for inputs with a mean square of 1; None uses 1e-4 for
            K = 1 and the pretraining initialisation for K > 1.

    Raises:
        UserError: a value is out of range or does not match the others.
    """

    experts: int
    top_k: int
    granularity: int = 1
    noise: float = 0.0
    seed: int = 0
    router_std: float | None = None

    def __post_init__(self) -> None:
        for key, value in (("--experts", self.experts), ("--top-k", self.top_k), ("--granularity", self.granularity)):
            if value < 1:
                raise UserError(f"{key}={value}", "too small", "give at least 1")
        if self.top_k > self.experts:
            raise UserError(
                f"--top-k={self.top_k}", f"more than --experts={self.experts}", f"give at most {self.experts}"
            )
        for key, value in (("--experts", self.experts), ("--top-k", self.top_k)):
            if value % self.granularity:
                raise UserError(
                    f"{key}={value}",
                    f"is not a multiple of --granularity={self.granularity}, so a token could not select complete MLPs",
                    "give a multiple",
                )
        if self.router_std is not None and not 0 < self.router_std < math.inf:
            raise UserError(
                f"--router-std={self.router_std}",
                "is not a standard deviation",
                "give a number above 0",
            )
        if not 0 <= self.noise < math.inf:
            raise UserError(f"--noise={self.noise}", "is out of range", "give 0 or more")

    def fields(self, width: int) -> dict[str, Any]:
        """Return the fields of `HyperMoEConfig` for experts made from an MLP of this width.

        Raises:
            UserError: the width is not divisible by the granularity.
        """
        if width % self.granularity:
            raise UserError(
                f"--granularity={self.granularity}", f"does not divide intermediate_size={width}", "give a divisor"
            )
        return {
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": width // self.granularity,
            "norm_topk_prob": self.top_k > 1,
        }

    def gate_up(self, name: str, gate: Callable[[], Tensor], up: Callable[[], Tensor]) -> Tensor:
        """Build `gate_up_proj` [N, 2F, D] from the dense gate and up projections [G * F, D]."""
        return join_gate_up(self._copies(f"{name}.gate", gate()), self._copies(f"{name}.up", up()))

    def down(self, name: str, down: Callable[[], Tensor]) -> Tensor:
        """Build `down_proj` [N, D, F] from the dense down projection [D, G * F]."""
        whole_DF = down().float() * (self.experts if self.top_k == 1 else self.granularity)
        return self._copies(name, whole_DF.T).transpose(1, 2)

    def router(self, name: str, model_config: HyperMoEConfig) -> Tensor:
        """Initialise the router's weight [N, D] at random, with equal rows for experts that form one MLP."""
        std = model_config.initializer_range
        if self.router_std is not None or self.top_k == 1:
            std = (self.router_std or _ROUTER_STD_OF_ONE_EXPERT) / model_config.hidden_size**0.5
        groups = self.experts // self.granularity
        rows_ND = torch.randn(groups, model_config.hidden_size, generator=self._generator(name)) * std
        return rows_ND.repeat_interleave(self.granularity, dim=0)

    def _copies(self, name: str, whole_FD: Tensor) -> Tensor:
        """Assign the G slices of the first dimension to the experts in turn; return [N, F, D]."""
        slices = whole_FD.float().chunk(self.granularity)
        copies_NFD = torch.stack([slices[expert % self.granularity] for expert in range(self.experts)])
        if self.noise:
            noise_NFD = torch.randn(copies_NFD.shape, generator=self._generator(name))
            copies_NFD += noise_NFD.mul_(self.noise * float(whole_FD.float().std()))
        return copies_NFD

    def _generator(self, name: str) -> torch.Generator:
        """Return a generator seeded by the tensor's name, so that every read gives the same values."""
        # The seed has 32 bits, because torch's CPU generator ignores higher bits.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
