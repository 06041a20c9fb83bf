"""What each exact form of the HyperExperts costs, and which modules may be kept: the choices behind "auto".

Shape legend: T tokens, D hidden size, A adapter size, B bottleneck, U sets, J HyperExperts of a token, R = T * J rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

Form = Literal["per_set", "factored", "per_token"]

# Of one layer's kept activations, about 16 D numbers a token, generated modules may add an eighth.
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
        """Numbers of one generated HyperExpert, 2DA + A + D."""
        return 2 * self.hidden * self.adapter + self.adapter + self.hidden


@dataclass(frozen=True)
class Cost:
    """Cost of a forward and backward pass in one layer.

    Attributes:
        flops: multiply-adds count as two.
        elements: numbers read from or written to memory, beside those that every form moves.
        products: small matrix products started one after another.
    """

    flops: int
    elements: int
    products: int


@dataclass(frozen=True)
class Rates:
    """What a device does, from `benchmarks/hyper_experts.py --calibrate`.

    Attributes:
        flops: FLOP/s of a matrix product.
        bytes: bytes/s of memory.
        start: seconds of one small matrix product beside its FLOPs.
    """

    flops: float
    bytes: float
    start: float


RATES: Mapping[tuple[str, torch.dtype], Rates] = MappingProxyType(
    {
        # 2 cores of an EPYC with AVX-512: 42 shapes at two sizes of the hypernetwork, 2026-11-24 and 25. Traffic is
        # this slow because much of it is to memory that was just mapped.
        ("cpu", torch.float32): Rates(flops=260e9, bytes=3.2e9, start=8e-6),
        ("cpu", torch.bfloat16): Rates(flops=940e9, bytes=7.4e9, start=29e-6),
        # Not measured: 40 % of the H100's published 989 TFLOP/s, 75 % of its 67 in fp32, 80 % of its 3.35 TB/s.
        # Products are grouped in bf16; otherwise each is a kernel to be started.
        ("cuda", torch.bfloat16): Rates(flops=400e12, bytes=2.7e12, start=0.0),
        ("cuda", torch.float32): Rates(flops=50e12, bytes=2.7e12, start=10e-6),
    }
)
_OTHERWISE = MappingProxyType({device: RATES[device, torch.float32] for device in ("cpu", "cuda")})


def cost_per_set(rows: int, sets: int, sizes: Sizes) -> Cost:
    """Generate `sets` modules, apply them to `rows` rows. Generating again in the backward pass is not counted."""
    generate, apply = 2 * sizes.bottleneck * sizes.module * sets, 4 * sizes.hidden * sizes.adapter * rows
    # A module is written and read, its gradient written and read by two products; 6 products a set use it.
    return Cost(flops=3 * (generate + apply), elements=6 * sets * sizes.module, products=6 * sets)


def cost_factored(rows: int, sizes: Sizes) -> Cost:
    """Contract `rows` rows with the B basis matrices of both maps."""
    basis = sizes.adapter * sizes.bottleneck
    # Forward writes and reads both intermediates, backward reads them and writes and reads their gradients.
    return Cost(flops=3 * 4 * basis * sizes.hidden * rows, elements=12 * basis * rows, products=0)


def seconds(cost: Cost, device: str, dtype: torch.dtype) -> float:
    """Time that a cost takes on a device, by `RATES`."""
    rates = RATES.get((device, dtype), _OTHERWISE.get(device, _OTHERWISE["cuda"]))
    moved = cost.elements * dtype.itemsize
    return cost.flops / rates.flops + moved / rates.bytes + cost.products * rates.start


def cheaper_form(rows: int, sets: int, sizes: Sizes, device: str, dtype: torch.dtype) -> Form:
    """ "per_set" unless "factored" takes less time."""
    per_set = seconds(cost_per_set(rows, sets, sizes), device, dtype)
    return "per_set" if per_set <= seconds(cost_factored(rows, sizes), device, dtype) else "factored"


def generated_weights_fit(tokens: int, sets: int, sizes: Sizes) -> bool:
    """Whether a layer's generated modules may be kept for the backward pass.

    They may where they are a small share of the layer's other activations. Where they are, those of all
    layers are generated in one go (if the sets are known before routing); where not, each layer generates its
    own, and again in the backward pass. Depends on sizes alone, so all ranks decide alike.
    """
    return sets * sizes.module <= _NUMBERS_PER_TOKEN * tokens * sizes.hidden
