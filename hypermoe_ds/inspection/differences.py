"""Compare the parameters of two folders."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

from hypermoe_ds.inspection.statistics import Progress, by_group, norm_of
from hypermoe_ds.inspection.tensor_readers import Shape, TensorReader, ranges


class Distance(NamedTuple):
    """Distance between two tensors, or between all tensors of a group.

    Attributes:
        difference: L2 norm of second - first.
        norm: L2 norm of the first tensor.
    """

    difference: float
    norm: float

    @property
    def relative(self) -> float:
        """Difference divided by the norm of the first tensor; infinite if only the first tensor is zero."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.norm if self.norm else math.inf


@dataclass(frozen=True)
class Differences:
    """Differences between two folders.

    Attributes:
        only_first: parameters missing in the second folder.
        only_second: parameters missing in the first folder.
        reshaped: both shapes of each parameter whose shapes differ.
        tensors: distances between parameters of the same shape, for each kind that both folders store.
    """

    only_first: list[str]
    only_second: list[str]
    reshaped: dict[str, tuple[Shape, Shape]]
    tensors: dict[str, dict[str, Distance]]

    def groups(self, kind: str) -> dict[str, Distance]:
        """Return the distance for each group of parameters."""
        tensors = self.tensors[kind]
        return {
            group: Distance(
                math.hypot(*(tensors[name].difference for name in names)),
                math.hypot(*(tensors[name].norm for name in names)),
            )
            for group, names in by_group(tensors).items()
        }

    def largest(self, kind: str, count: int = 10) -> list[str]:
        """Return the parameters with the largest relative distances, NaN first."""
        changed = {name: d.relative for name, d in self.tensors[kind].items() if d.relative != 0}
        return sorted(changed, key=lambda name: (not math.isnan(changed[name]), -changed[name]))[:count]

    def to_dict(self) -> dict[str, Any]:
        """Return the differences as a dict for JSON."""
        return {
            **asdict(self),
            "groups": {kind: _as_dicts(self.groups(kind)) for kind in self.tensors},
            "tensors": {kind: _as_dicts(tensors) for kind, tensors in self.tensors.items()},
            "largest": {kind: self.largest(kind) for kind in self.tensors},
        }


def compare(first: TensorReader, second: TensorReader, progress: Progress = lambda _: None) -> Differences:
    """Compare the parameters that are in both folders, range by range."""
    shared = [name for name in first.shapes if first.shapes[name] == second.shapes.get(name)]
    kinds = [kind for kind in first.kinds if kind in second.kinds]
    return Differences(
        only_first=sorted(first.shapes.keys() - second.shapes.keys()),
        only_second=sorted(second.shapes.keys() - first.shapes.keys()),
        reshaped={
            name: (shape, second.shapes[name])
            for name, shape in first.shapes.items()
            if name in second.shapes and name not in shared
        },
        tensors={kind: {name: _distance(first, second, name, kind, progress) for name in shared} for kind in kinds},
    )


def elements_to_compare(first: TensorReader, second: TensorReader) -> int:
    """Return the number of elements that `compare` reads from each folder."""
    kinds = sum(kind in second.kinds for kind in first.kinds)
    return kinds * sum(prod(shape) for name, shape in first.shapes.items() if shape == second.shapes.get(name))


def _distance(first: TensorReader, second: TensorReader, name: str, kind: str, progress: Progress) -> Distance:
    differences, norms = [], []
    for start, stop in ranges(prod(first.shapes[name])):
        values = first.read_range(name, start, stop, kind)
        norms.append(norm_of(values))
        differences.append(norm_of(second.read_range(name, start, stop, kind) - values))
        progress(stop - start)
    return Distance(math.hypot(*differences), math.hypot(*norms))


def _as_dicts(distances: Mapping[str, Distance]) -> dict[str, dict[str, float]]:
    return {name: {**distance._asdict(), "relative": distance.relative} for name, distance in distances.items()}
