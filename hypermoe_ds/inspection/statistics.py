"""Compute statistics of the model in a folder: parameter counts, norms, NaN, Inf and similarity of experts.

Shape legend: N experts, P pairs of experts, c elements per expert that are read at once.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.shards import WEIGHT
from hypermoe_ds.inspection.tensor_readers import Provenance, TensorReader, ranges

Progress = Callable[[int], Any]  # called with the number of elements read

NEAR_COPIES = 0.9  # report two experts as near copies if their cosine is at least this
_MOST_EXPERTS = 4096  # the matrix of cosines takes 8 N^2 bytes
COLLAPSING = 0.5  # report a layer's experts as collapsing if their mean cosine is at least this

# Groups in display order. The norms pattern is tried first. A name belongs to the first group whose pattern matches.
_PATTERNS = {
    "embeddings": r".*embed_tokens\..*",
    "attention": r".*\.self_attn\..*",
    "router": r".*\.router\..*",
    "experts": r".*\.experts\..*",
    "shared experts": r".*\.shared_experts\..*",
    "dense layers": r".*\.mlp\.(gate|up|down)_proj\..*",
    "HyperExpert encoders": r".*\.hyper_experts\.encoder\..*",
    "baked HyperExperts": r".*\.hyper_experts\..*",
    "hypernetwork": r".*\.?hypernetwork\..*",
    "norms": r"(.*\.)?(\w*layernorm|norm|q_norm|k_norm)\.weight",
    "head": r"lm_head\..*",
    "other": r".*",
}
_BY_PRIORITY = ("norms", *(group for group in _PATTERNS if group != "norms"))


def by_group(names: Iterable[str]) -> dict[str, list[str]]:
    """Group parameter names by model component."""
    members: dict[str, list[str]] = {group: [] for group in _PATTERNS}
    for name in names:
        members[next(group for group in _BY_PRIORITY if re.fullmatch(_PATTERNS[group], name))].append(name)
    return {group: found for group, found in members.items() if found}


@dataclass(frozen=True)
class Measured:
    """Statistics of a tensor or a group of tensors.

    Attributes:
        elements: number of elements.
        norm: L2 norm of the finite elements.
        nan: number of NaN elements.
        inf: number of infinite elements.
    """

    elements: int
    norm: float
    nan: int
    inf: int

    @property
    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return self.nan == self.inf == 0


@dataclass(frozen=True)
class Similarity:
    """Similarity of the experts of one layer: cosines between their flattened weights.

    Attributes:
        block: name of the layer's MoE block.
        experts: N.
        mean: mean cosine over all pairs; NaN if a weight is NaN.
        largest: largest cosine.
        pair: the pair with the largest cosine.
    """

    block: str
    experts: int
    mean: float
    largest: float
    pair: tuple[int, int]

    def warning(self) -> str | None:
        """Return a description of the problem, or None if the experts differ enough."""
        if self.mean >= COLLAPSING:
            return (
                f"the experts of {self.block} are collapsing: their mean cosine is {self.mean:.3f}, "
                f"{COLLAPSING} or more"
            )
        if self.largest >= NEAR_COPIES:
            first, second = self.pair
            return (
                f"experts {first} and {second} of {self.block} are near copies: their cosine is "
                f"{self.largest:.3f}, {NEAR_COPIES} or more"
            )
        return None


@dataclass(frozen=True)
class Inspection:
    """Statistics of a folder.

    Attributes:
        provenance: kind and origin of the folder.
        tensors: statistics by kind ("weight", "exp_avg", "exp_avg_sq") and parameter name in the training model.
        similarity: similarity of the experts, for each layer with more than one expert.
    """

    provenance: Provenance
    tensors: dict[str, dict[str, Measured]]
    similarity: list[Similarity]

    def groups(self, kind: str = WEIGHT) -> dict[str, Measured]:
        """Return the statistics of each group, in display order."""
        tensors = self.tensors[kind]
        return {group: _together([tensors[name] for name in names]) for group, names in by_group(tensors).items()}

    def not_finite(self) -> dict[str, Measured]:
        """Return the tensors that contain NaN or Inf, by KIND/NAME."""
        return {
            f"{kind}/{name}": measured
            for kind, tensors in self.tensors.items()
            for name, measured in tensors.items()
            if not measured.is_finite
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as a dict for JSON."""
        return {
            "provenance": asdict(self.provenance),
            "groups": {kind: {name: asdict(m) for name, m in self.groups(kind).items()} for kind in self.tensors},
            "not_finite": {name: asdict(measured) for name, measured in self.not_finite().items()},
            "expert_similarity": [{**asdict(layer), "warning": layer.warning()} for layer in self.similarity],
            "tensors": {kind: {name: asdict(m) for name, m in part.items()} for kind, part in self.tensors.items()},
        }


def inspect(reader: TensorReader, progress: Progress = lambda _: None) -> Inspection:
    """Compute the statistics of a folder. Read a few MiB at a time, and read expert weights twice."""
    tensors = {
        kind: {name: measure(reader, name, kind, progress) for name in sorted(reader.shapes)} for kind in reader.kinds
    }
    blocks = expert_blocks(reader.shapes).items()
    return Inspection(reader.provenance, tensors, [compare_experts(reader, *block, progress) for block in blocks])


def elements_to_inspect(reader: TensorReader) -> int:
    """Return the number of elements that `inspect` reads."""
    elements = {name: prod(shape) for name, shape in reader.shapes.items()}
    stacks = [name for names in expert_blocks(reader.shapes).values() for name in names]
    return len(reader.kinds) * sum(elements.values()) + sum(elements[name] for name in stacks)


def measure(reader: TensorReader, name: str, kind: str, progress: Progress) -> Measured:
    """Compute the statistics of a parameter or one of its moments."""
    elements, square, nan, inf = prod(reader.shapes[name]), 0.0, 0, 0
    for start, stop in ranges(elements):
        values = reader.read_range(name, start, stop, kind)
        norm = norm_of(values)
        if not math.isfinite(norm):
            nan += int(values.isnan().sum())
            inf += int(values.isinf().sum())
            norm = norm_of(values[values.isfinite()])
        square += norm**2
        progress(stop - start)
    return Measured(elements, math.sqrt(square), nan, inf)


def norm_of(values: Tensor) -> float:
    """Return the L2 norm, accumulated in fp64."""
    norm: float = torch.linalg.vector_norm(values, dtype=torch.float64).item()
    return norm


def expert_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """List the stacked expert weights [N, ...] of each MoE block with 2 to 4,096 experts."""
    blocks: dict[str, list[str]] = {}
    for name in sorted(shapes, key=_by_layer):
        match = re.fullmatch(r"(.*)\.experts\.(w[123]|gate_up_proj|down_proj)", name)
        if match and len(shapes[name]) == 3 and 1 < shapes[name][0] <= _MOST_EXPERTS:
            blocks.setdefault(match[1], []).append(name)
    return blocks


def compare_experts(reader: TensorReader, block: str, stacks: list[str], progress: Progress) -> Similarity:
    """Compute the cosine between the flattened weights of each pair of experts.

    Inner products are accumulated range by range over all experts at once, so each weight is read only once.

    Args:
        reader: reader of the folder.
        block: name of the MoE block.
        stacks: names of its expert weights, each [N, ...].
        progress: called with the number of elements read.
    """
    N = reader.shapes[stacks[0]][0]
    gram_NN = torch.zeros(N, N, dtype=torch.float64)
    for name in stacks:
        elements = prod(reader.shapes[name]) // N
        for part_Nc in _parts_of_experts(reader, name, N, elements):
            gram_NN += (part_Nc @ part_Nc.T).double()
            progress(part_Nc.numel())
    norm_N = gram_NN.diagonal().sqrt()
    cosine_NN = gram_NN / torch.outer(norm_N, norm_N).clamp_min(torch.finfo(torch.float64).tiny)
    first_P, second_P = torch.triu_indices(N, N, offset=1)
    cosine_P = cosine_NN[first_P, second_P]
    at = int(cosine_P.argmax())
    return Similarity(block, N, cosine_P.mean().item(), cosine_P[at].item(), (int(first_P[at]), int(second_P[at])))


def _together(parts: list[Measured]) -> Measured:
    return Measured(
        elements=sum(part.elements for part in parts),
        norm=math.hypot(*(part.norm for part in parts)),
        nan=sum(part.nan for part in parts),
        inf=sum(part.inf for part in parts),
    )


def _parts_of_experts(reader: TensorReader, name: str, N: int, elements: int) -> Iterator[Tensor]:
    """Yield the weights of all experts, [N, c], range by range."""
    for start, stop in ranges(elements, max(1, 2**20 // N)):
        yield torch.stack([reader.read_range(name, n * elements + start, n * elements + stop) for n in range(N)])


def _by_layer(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders layer 10 after layer 9."""
    return [(int(part), "") if re.fullmatch("[0-9]{1,9}", part) else (-1, part) for part in name.split(".")]
