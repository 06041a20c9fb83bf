"""Cost model of the exact forms of HyperExperts; it determines the form that "auto" uses and whether generated weights
are saved.

Shape legend: T tokens, D hidden size, A adapter size, B bottleneck, U selections, J HyperExperts of a token, R = T * J.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

Form = Literal["per_set", "factored", "per_token"]

# Generated weights may add an eighth to the saved activations of a layer, which are about 16 D numbers per token.
_NUMBERS_PER_TOKEN = 2


@dataclass(frozen=True)
class Sizes:
    """Sizes of a hypernetwork.

    Attributes:
        hidden: D.
        adapter: A.
        bottleneck: B.
    """

    hidden: int
    adapter: int
    bottleneck: int

    @property
    def module(self) -> int:
        """Parameters of one generated HyperExpert, 2DA + A + D."""
        return 2 * self.hidden * self.adapter + self.adapter + self.hidden


@dataclass(frozen=True)
class Cost:
    """Cost of a forward and backward pass in one layer.

    Attributes:
        flops: number of FLOPs; a multiply-add counts as two.
        elements: numbers read from or written to memory, without those that every form moves.
        products: small matrix products that run one after another.
    """

    flops: int
    elements: int
    products: int


@dataclass(frozen=True)
class Rates:
    """Rates of a device, measured by `benchmarks/hyper_experts.py --calibrate`.

    Attributes:
        flops: FLOP/s of a matrix product.
        bytes: memory bandwidth, bytes/s.
        start: overhead of one small matrix product, seconds.
    """

    flops: float
    bytes: float
    start: float


RATES: Mapping[tuple[str, torch.dtype], Rates] = MappingProxyType(
    {
        # 2 cores of an EPYC with AVX-512, 42 shapes at two sizes of the hypernetwork, 2026-11-24 and 25. Bandwidth is
        # low because much of the traffic goes to newly mapped memory.
        ("cpu", torch.float32): Rates(flops=260e9, bytes=3.2e9, start=8e-6),
        ("cpu", torch.bfloat16): Rates(flops=940e9, bytes=7.4e9, start=29e-6),
        # Not measured: 40 % of the H100's published 989 TFLOP/s, 75 % of its 67 TFLOP/s in fp32, and 80 % of its 3.35
        # TB/s. Products are grouped in bf16; in fp32 each one starts a kernel.
        ("cuda", torch.bfloat16): Rates(flops=400e12, bytes=2.7e12, start=0.0),
        ("cuda", torch.float32): Rates(flops=50e12, bytes=2.7e12, start=10e-6),
    }
)
_DEFAULT_RATES = MappingProxyType({device: RATES[device, torch.float32] for device in ("cpu", "cuda")})


def cost_per_selection(rows: int, sets: int, sizes: Sizes) -> Cost:
    """Return the cost of generating `sets` HyperExperts and applying them to `rows` rows, without recomputation."""
    generate, apply = 2 * sizes.bottleneck * sizes.module * sets, 4 * sizes.hidden * sizes.adapter * rows
    # A HyperExpert is written and read, and its gradient is written and read by two products; 6 products per set use
    # it.
    return Cost(flops=3 * (generate + apply), elements=6 * sets * sizes.module, products=6 * sets)


def cost_factored(rows: int, sizes: Sizes) -> Cost:
    """Return the cost of contracting `rows` rows with the B basis matrices of both maps."""
    basis = sizes.adapter * sizes.bottleneck
    # The forward pass writes and reads both intermediates; the backward pass reads them, and writes and reads their
    # gradients.
    return Cost(flops=3 * 4 * basis * sizes.hidden * rows, elements=12 * basis * rows, products=0)


def seconds(cost: Cost, device: str, dtype: torch.dtype) -> float:
    """Estimate the time of a cost on a device from `RATES`."""
    rates = RATES.get((device, dtype), _DEFAULT_RATES.get(device, _DEFAULT_RATES["cuda"]))
    moved = cost.elements * dtype.itemsize
    return cost.flops / rates.flops + moved / rates.bytes + cost.products * rates.start


def cheaper_form(rows: int, sets: int, sizes: Sizes, device: str, dtype: torch.dtype) -> Form:
    """Return "factored" if it takes less time, otherwise "per_set"."""
    per_set = seconds(cost_per_selection(rows, sets, sizes), device, dtype)
    return "per_set" if per_set <= seconds(cost_factored(rows, sizes), device, dtype) else "factored"


def generated_weights_fit(tokens: int, sets: int, sizes: Sizes) -> bool:
    """Return whether the generated weights of a layer may be saved for the backward pass.

    They are saved if they are a small share of the layer's other activations. Then the weights of all layers are
    generated together, if the selections are known before routing. Otherwise each layer generates its own weights, and
    generates them again in the backward pass. The answer depends only on sizes, so it is the same on all ranks.
    """
    return sets * sizes.module <= _NUMBERS_PER_TOKEN * tokens * sizes.hidden
