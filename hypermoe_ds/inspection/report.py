"""Format statistics and differences as text and as JSON."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypermoe_ds.checkpoint.shards import WEIGHT
from hypermoe_ds.errors import UserError
from hypermoe_ds.inspection.differences import Differences
from hypermoe_ds.inspection.statistics import COLLAPSING, NEAR_COPIES, Inspection

_SHOWN = 10  # maximum number of tensors per list


def inspection_lines(seen: Inspection) -> Iterator[str]:
    """Describe a folder and its model, line by line."""
    yield from _provenance_lines(seen)
    yield from _group_lines(seen)
    yield from _similarity_lines(seen)
    broken = seen.not_finite()
    yield ""
    yield f"NaN or Inf: {_count(len(broken), 'tensor')}" if broken else "NaN or Inf: none"
    for name, measured in broken.items():
        yield f"  {name}: {measured.nan:,} NaN, {measured.inf:,} Inf of {measured.elements:,}"


def difference_lines(differences: Differences) -> Iterator[str]:
    """Describe the differences between two folders, line by line; distances are relative to the norms of the first."""
    for title, names in (
        ("only in the first folder", differences.only_first),
        ("only in the second folder", differences.only_second),
    ):
        yield from _listed(title, names)
    reshaped = [f"{name}: {list(a)} and {list(b)}" for name, (a, b) in differences.reshaped.items()]
    yield from _listed("different shapes", reshaped)
    for kind, tensors in differences.tensors.items():
        yield ""
        yield f"{kind}: ||second - first|| / ||first||, for {_count(len(tensors), 'tensor')} in both folders"
        if not tensors:
            yield "  nothing to compare"
        elif all(distance.difference == 0 for distance in tensors.values()):
            yield "  no difference"
            continue
        for name, distance in differences.groups(kind).items():
            yield f"  {name:<22} {distance.relative:.3e}"
        yield "  largest:"
        for name in differences.largest(kind, _SHOWN):
            yield f"    {tensors[name].relative:.3e}  {name}"


def write_json(path: Path, inspections: list[Inspection], differences: list[Differences]) -> None:
    """Write all statistics, including those per tensor; NaN and infinities, which JSON cannot represent, become null.

    Raises:
        UserError: the file cannot be written.
    """
    whole = {"folders": [s.to_dict() for s in inspections], "differences": [d.to_dict() for d in differences]}
    try:
        path.write_text(json.dumps(_without_nan(whole), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json={path}", f"cannot be written ({error.strerror})", "choose another file") from None


def _provenance_lines(seen: Inspection) -> Iterator[str]:
    provenance = seen.provenance
    yield f"{provenance.path}: {provenance.kind}"
    rows = {
        "step": "unknown" if provenance.step is None else f"{provenance.step:,}",
        "layout": f"{_count(len(provenance.files), 'file')}, {sum(provenance.files.values()) / 2**30:.3f} GiB, "
        f"{_count(provenance.cut_tensors, 'tensor')} split over files",
        "stored as": ", ".join(provenance.dtypes),
        "written by": ", ".join(f"{name} {version}" for name, version in provenance.written_by.items()) or "unknown",
    }
    state = ", ".join(
        f"{key} {value}" for key, value in provenance.state.items() if isinstance(value, int | float | str)
    )
    if state:
        rows["state"] = state
    for name, text in rows.items():
        yield f"  {name:<12} {text}"


def _group_lines(seen: Inspection) -> Iterator[str]:
    moments = [kind for kind in seen.tensors if kind != WEIGHT]
    yield ""
    yield f"{'group':<22} {'parameters':>16} {'norm':>12}" + "".join(f" {f'norm of {kind}':>20}" for kind in moments)
    for name, measured in seen.groups().items():
        others = "".join(f" {seen.groups(kind)[name].norm:>20.4e}" for kind in moments)
        yield f"{name:<22} {measured.elements:>16,} {measured.norm:>12.4f}{others}"
    yield f"{'all':<22} {sum(measured.elements for measured in seen.groups().values()):>16,}"


def _similarity_lines(seen: Inspection) -> Iterator[str]:
    if not seen.similarity:
        return
    yield ""
    yield "cosine between two experts of a layer: mean over all pairs, largest, and the pair with the largest"
    for layer in seen.similarity:
        first, second = layer.pair
        yield f"  {layer.block}: {layer.mean:.4f}, {layer.largest:.4f}, {first} and {second} of {layer.experts}"
    warnings = [warning for layer in seen.similarity if (warning := layer.warning())]
    yield from warnings or [
        f"the experts differ: every mean is below {COLLAPSING} and every pair below {NEAR_COPIES}"
        if all(math.isfinite(layer.mean) for layer in seen.similarity)
        else "some experts have NaN or Inf, so their cosines are undefined"
    ]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _listed(title: str, entries: list[str]) -> Iterator[str]:
    if not entries:
        return
    yield ""
    yield f"{title}: {_count(len(entries), 'tensor')}"
    yield from (f"  {entry}" for entry in entries[:_SHOWN])
    if len(entries) > _SHOWN:
        yield f"  and {len(entries) - _SHOWN} more (all in --json)"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
