"""Convert expert weights between the layouts of the Transformers model and the training model.

`BLOCK.experts.gate_up_proj` [N, 2F, D] holds w1 (gate) and w3 (up), each [N, F, D]; `BLOCK.experts.down_proj` [N, D, F]
is w2. All other tensors have the same name and shape in both models.

Shape legend: N experts, F expert width, D hidden size.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def training_shapes(name: str, shape: torch.Size) -> dict[str, torch.Size]:
    """Return the training model's names and shapes for a tensor of the Transformers model."""
    if name.endswith(_GATE_UP) and len(shape) == 3 and shape[1] % 2 == 0:
        half = torch.Size((shape[0], shape[1] // 2, shape[2]))
        return {name.removesuffix("gate_up_proj") + part: half for part in ("w1", "w3")}
    if name.endswith(_DOWN):
        return {name.removesuffix("down_proj") + "w2": shape}
    return {name: shape}


def training_view(tensor: Tensor, name: str) -> Tensor:
    """Return a view of the part of a Transformers tensor that the training model calls `name`."""
    if name.endswith((".experts.w1", ".experts.w3")):
        return split_gate_up(tensor)[name.endswith("w3")]
    return tensor


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the gate and up projections, each [..., F, D], of a tensor [..., 2F, D]."""
    gate, up = gate_up.chunk(2, dim=-2)
    return gate, up


def join_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Join the gate and up projections, each [..., F, D], into a tensor [..., 2F, D]."""
    return torch.cat((gate, up), dim=-2)


def training_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Rename and split the Transformers model's tensors into those of the training model, which checkpoints store."""
    for name, tensor in weights:
        for part in training_shapes(name, tensor.shape):
            yield part, training_view(tensor, part)
