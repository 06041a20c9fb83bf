"""Compare saving the generated weights of HyperExperts with generating the weights again in the backward pass.

Both sides alternate in one process. Memory is measured in a separate process for each side. In the table, the row
*generated again* separates two cases: above it, training saves the generated weights; below it, training generates the
weights again.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from hyper_experts import DTYPES, LAYERS, D, Target, added_memory, build, medians, peak_bytes, without_gradients
from hypermoe_ds.modeling.generated import Assignment
from hypermoe_ds.modeling.hyper_costs import generated_weights_fit
from hypermoe_ds.modeling.hyper_experts import HyperExperts, HyperNetwork
from hypermoe_ds.process import one_line_errors
from results import check_arguments, machine, machine_line

_TOKENS, _SELECTIONS = 2048, (8, 16, 31, 64, 128, 256)


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer and additional bytes of all layers, for one forward and backward pass."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Case:
    """Cost of saving the generated weights and of generating the weights again, for one number of selections."""

    selections: int
    saved: Cost
    recomputed: Cost


def main() -> None:
    """Run the benchmark, or measure the memory of one side in a subprocess."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="default: fp32")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="measured runs of each side (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results: seconds and bytes")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_arguments(arguments, {"repeats": 1}, arguments.json)
    target = Target("cpu", DTYPES[arguments.dtype])
    if arguments.memory_of == "expert":
        print(added_memory("expert", target))
    elif arguments.memory_of:
        selections, recompute = map(int, arguments.memory_of.split(","))
        layers, hypernetwork, x_TD = build_layers(selections, target)
        base = peak_bytes("cpu")
        one_pass(layers, hypernetwork, x_TD, recompute=bool(recompute))
        print(peak_bytes("cpu") - base)
    else:
        report(arguments.dtype, arguments.repeats, target, arguments.json)


def report(dtype: str, repeats: int, target: Target, path: Path | None) -> None:
    """Measure all cases, print the table and write the results as JSON to `path`."""
    expert_bytes = measure_memory("expert", dtype)
    cases = [compare(count, repeats, dtype, target) for count in tqdm(_SELECTIONS, unit="shape", leave=False)]
    print(
        "| selections | time recomputed / saved | saved, ms | recomputed, ms "
        "| memory saved / expert's | recomputed / expert's |"
    )
    print("| ---: |" + " ---: |" * 5)
    sizes = build(2, 1, target)[1].sizes
    saves_weights = True
    for case in cases:
        if saves_weights and not generated_weights_fit(_TOKENS, case.selections, sizes):
            saves_weights = False
            print("| *generated again* | | | | | |")
        print(
            f"| {case.selections} | {case.recomputed.seconds / case.saved.seconds:.2f} "
            f"| {case.saved.seconds * 1e3:.1f} | {case.recomputed.seconds * 1e3:.1f} "
            f"| {case.saved.bytes / expert_bytes:.2f} | {case.recomputed.bytes / expert_bytes:.2f} |"
        )
    print(f"\n{dtype}, T={_TOKENS}, {LAYERS} layers | {machine_line('cpu')}")
    if path:
        content = {"cases": [asdict(case) for case in cases], "expert_bytes": expert_bytes, "machine": machine("cpu")}
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def build_layers(selections: int, target: Target) -> tuple[list[HyperExperts], HyperNetwork, torch.Tensor]:
    """Build the HyperExperts of all layers for `selections` experts and K=1, and an input."""
    return *build(selections, LAYERS, target), torch.randn(_TOKENS, D, **target._asdict()).requires_grad_()


def one_pass(layers: list[HyperExperts], hypernetwork: HyperNetwork, x_TD: torch.Tensor, *, recompute: bool) -> None:
    """Run all layers forward and backward; each layer generates its own HyperExperts."""
    y_TD = x_TD
    for layer in layers:
        z_UH = layer.encode_all(1, x_TD.device)
        assignment = Assignment((torch.arange(_TOKENS) % len(z_UH)).unsqueeze(1))
        layer_U = torch.full((len(z_UH),), layer.layer_index)
        y_TD = y_TD + hypernetwork(z_UH, layer_U, x_TD, assignment, "per_set", recompute)
    y_TD.backward(x_TD.detach())


def compare(selections: int, repeats: int, dtype: str, target: Target) -> Case:
    """Measure the time and memory of both sides."""
    layers, hypernetwork, x_TD = build_layers(selections, target)
    sides = {
        name: without_gradients(
            partial(one_pass, layers, hypernetwork, x_TD, recompute=recompute), hypernetwork, *layers
        )
        for name, recompute in (("saved", False), ("recomputed", True))
    }
    seconds = medians(sides, repeats, "cpu")
    saved, recomputed = (
        Cost(seconds[name] / LAYERS, measure_memory(f"{selections},{int(name == 'recomputed')}", dtype))
        for name in ("saved", "recomputed")
    )
    return Case(selections, saved, recomputed)


def measure_memory(side: str, dtype: str) -> int:
    """Return the peak memory, in bytes, that one pass adds. The measuring process allocates large tensors with mmap."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--dtype", dtype, "--memory-of", side]
    return int(subprocess.check_output(command, env=environment))


if __name__ == "__main__":
    with one_line_errors():
        main()
