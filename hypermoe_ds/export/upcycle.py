"""A dense model as a Mixture of Experts that starts as the same function (sparse upcycling, arXiv 2212.05055).

Every expert starts as the dense MLP, or as one of G equal slices of it. What comes out is the dense MLP's output:

- K > 1: the gates of a token are made to sum to one (`norm_topk_prob`), and the experts are alike, so their weighted
  sum is the MLP whatever the router says. With G slices the router's rows of G neighbours, which together are the MLP,
  are equal, so that a token takes them together (virtual groups, arXiv 2410.07524), each with 1 / G of the group's
  gate: the down projections start G times as large.
- K = 1: the gate is the router's probability p, never 1. The router starts so small that p is 1 / N to about 1e-4,
  and the down projections N times as large. Which expert is chosen depends on the direction of the router's rows
  alone, so tokens are spread as by a larger one, until the first steps move it. The function is the same up to that
  1e-4; a larger router is steadier and changes it more (`router_std`).

Shape legend: D hidden size, N experts, G slices, F width of an expert.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig

_ROUTER_STD_OF_ONE_EXPERT = 1e-4


@dataclass(frozen=True)
class Upcycling:
    """What becomes of a dense MLP.

    Args:
        experts: N.
        top_k: K.
        granularity: G, slices that an MLP is cut into.
        noise: normal noise on every expert's weights, in standard deviations of the dense tensor.
        seed: seed of the router, the noise and the HyperExperts.
        router_std: standard deviation of the router's logits for inputs of mean square 1; None takes 1e-4 for K = 1
            and otherwise that of a pretraining's start.

    Raises:
        UserError: numbers that do not fit each other.
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
            raise UserError(f"--top-k={self.top_k}", f"more than --experts={self.experts}", "give at most that")
        for key, value in (("--experts", self.experts), ("--top-k", self.top_k)):
            if value % self.granularity:
                raise UserError(
                    f"{key}={value}",
                    f"is not a multiple of --granularity={self.granularity}, so that a token cannot take whole MLPs",
                    "give a multiple",
                )
        if self.router_std is not None and not 0 < self.router_std < math.inf:
            raise UserError(
                f"--router-std={self.router_std}",
                "is not a spread of a router's logits",
                "give more than 0",
            )
        if not 0 <= self.noise < math.inf:
            raise UserError(f"--noise={self.noise}", "is not a number of standard deviations", "give 0 or more")

    def fields(self, width: int) -> dict[str, Any]:
        """Fields of `HyperMoEConfig` for experts made of an MLP of this width.

        Raises:
            UserError: it cannot be cut into so many slices.
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
        """`gate_up_proj` [N, 2F, D] from the dense gate and up projections [G * F, D]."""
        halves = [self._copies(f"{name}.{half}", read()) for half, read in (("gate", gate), ("up", up))]
        return torch.cat(halves, dim=1)

    def down(self, name: str, down: Callable[[], Tensor]) -> Tensor:
        """`down_proj` [N, D, F] from the dense down projection [D, G * F]."""
        whole_DF = down().float() * (self.experts if self.top_k == 1 else self.granularity)
        return self._copies(name, whole_DF.T).transpose(1, 2)

    def router(self, name: str, config: HyperMoEConfig) -> Tensor:
        """The router's weight [N, D]: small and random, alike for the experts that together are the MLP."""
        std = config.initializer_range
        if self.router_std is not None or self.top_k == 1:
            std = (self.router_std or _ROUTER_STD_OF_ONE_EXPERT) / config.hidden_size**0.5
        groups = self.experts // self.granularity
        rows_ND = torch.randn(groups, config.hidden_size, generator=self._generator(name)) * std
        return rows_ND.repeat_interleave(self.granularity, dim=0)

    def _copies(self, name: str, whole_FD: Tensor) -> Tensor:
        """Slices of the first dimension, in turn, for all experts; [N, F, D]."""
        slices = whole_FD.float().chunk(self.granularity)
        copies_NFD = torch.stack([slices[expert % self.granularity] for expert in range(self.experts)])
        if self.noise:
            noise_NFD = torch.randn(copies_NFD.shape, generator=self._generator(name))
            copies_NFD += noise_NFD.mul_(self.noise * float(whole_FD.float().std()))
        return copies_NFD

    def _generator(self, name: str) -> torch.Generator:
        """One for each tensor, so that it is the same whenever it is read."""
        # In 32 bits: torch's generator on the CPU takes no more of a seed.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
