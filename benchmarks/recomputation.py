"""What it costs to generate HyperExperts again in the backward pass, and what keeping them would: time in turn in one
process, memory in a process of its own each. Below the line are sets whose modules are kept in training."""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hyper_experts import DTYPES, LAYERS, D, added_memory, build, held, medians, without_gradients
from hypermoe_ds.modeling.generated import Assignment
from hypermoe_ds.modeling.hyper_costs import generated_weights_fit
from hypermoe_ds.modeling.hyper_experts import HyperExperts, HyperNetwork
from hypermoe_ds.process import one_line_errors
from results import check_arguments, machine

_TOKENS, _SETS = 2048, (8, 16, 31, 64, 128, 256)


def main() -> None:
    """Arguments and wiring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="default: fp32")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="counted runs of each side (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, seconds and bytes")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    check_arguments(given, {"repeats": 1}, given.json)
    where = {"device": "cpu", "dtype": DTYPES[given.dtype]}
    if given.memory_of == "expert":
        print(added_memory("expert", where))
    elif given.memory_of:
        sets, recompute = map(int, given.memory_of.split(","))
        branches, hypernetwork, x_TD = parts(sets, where)
        base = held("cpu")
        one_pass(branches, hypernetwork, x_TD, recompute=bool(recompute))
        print(held("cpu") - base)
    else:
        report(given.dtype, given.repeats, where, given.json)


def report(dtype: str, repeats: int, where: dict[str, Any], path: Path | None) -> None:
    """Measures and prints; writes JSON if asked to."""
    expert = memory("expert", dtype)
    found = [compare(sets, repeats, dtype, where) for sets in tqdm(_SETS, unit="shape", leave=False)]
    print(
        "| sets | time recomputed / kept | kept, ms | recomputed, ms | memory kept / expert's | recomputed / expert's |"
    )
    print("| ---: |" + " ---: |" * 5)
    line = False
    for case in found:
        kept, again = case["kept"], case["recomputed"]
        if not line and not generated_weights_fit(_TOKENS, case["sets"], build(2, 1, where)[1].sizes):
            line = True
            print("| *generated again* | | | | | |")
        print(
            f"| {case['sets']} | {again['seconds'] / kept['seconds']:.2f} | {kept['seconds'] * 1e3:.1f} | "
            f"{again['seconds'] * 1e3:.1f} | {kept['bytes'] / expert:.2f} | {again['bytes'] / expert:.2f} |"
        )
    about = machine("cpu")
    print(f"\n{dtype}, T={_TOKENS}, {LAYERS} layers | " + " | ".join(f"{key} {value}" for key, value in about.items()))
    if path:
        path.write_text(json.dumps({"cases": found, "expert": expert, "machine": about}, indent=1) + "\n", "utf-8")


def parts(sets: int, where: dict[str, Any]) -> tuple[list[HyperExperts], HyperNetwork, torch.Tensor]:
    """The HyperExperts of all layers with that many sets of one expert, and the input of each."""
    return *build(sets, LAYERS, where), torch.randn(_TOKENS, D, **where).requires_grad_()


def one_pass(branches: list[HyperExperts], hypernetwork: HyperNetwork, x_TD: torch.Tensor, *, recompute: bool) -> None:
    """Forward and backward of all layers; each generates its own modules."""
    y_TD = x_TD
    for branch in branches:
        z_UH = branch.encode_all(1, x_TD.device)
        taken = Assignment((torch.arange(_TOKENS) % len(z_UH)).unsqueeze(1))
        layer_U = torch.full((len(z_UH),), branch.layer_index)
        y_TD = y_TD + hypernetwork(z_UH, layer_U, x_TD, taken, "per_set", recompute)
    y_TD.backward(x_TD.detach())


def compare(sets: int, repeats: int, dtype: str, where: dict[str, Any]) -> dict[str, Any]:
    """Seconds a layer and bytes of all layers, kept and generated again."""
    branches, hypernetwork, x_TD = parts(sets, where)
    sides = {
        name: without_gradients(
            partial(one_pass, branches, hypernetwork, x_TD, recompute=again), hypernetwork, *branches
        )
        for name, again in (("kept", False), ("recomputed", True))
    }
    seconds = medians(sides, repeats, "cpu")
    return {"sets": sets} | {
        name: {"seconds": seconds[name] / LAYERS, "bytes": memory(f"{sets},{int(name == 'recomputed')}", dtype)}
        for name in sides
    }


def memory(of: str, dtype: str) -> int:
    """Most bytes added by one pass in a process of its own, each tensor mapped by itself."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(
        subprocess.check_output([sys.executable, __file__, "--dtype", dtype, "--memory-of", of], env=environment)
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
