"""HyperExperts beside one expert of the same model, and their exact forms beside each other: time and memory, forward
and backward. Both sides of a ratio run in turn in one process; memory is that of a process of its own.

    python benchmarks/hyper_experts.py [--dtype bf16] [--json FILE] [--plot FILE.png]

A quarter of an hour on 2 cores in fp32, two minutes with --skip-grid.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling.generated import HyperExpertWeights
from hypermoe_ds.modeling.hyper_costs import Sizes, cheaper_form, cost_factored, cost_per_set
from hypermoe_ds.modeling.hyper_experts import HyperExperts, HyperNetwork, SelectionEncoder, generate_ahead
from hypermoe_ds.process import one_line_errors
from results import check_arguments, device_name, machine

PUBLISHED, SMALL = Sizes(768, 64, 128), Sizes(256, 16, 64)  # at GPT-2 small's width, and those of tiny-10m
D, LAYERS, WIDTH = PUBLISHED.hidden, 12, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID = [(PUBLISHED, N, K, T) for N in (8, 16, 64) for K in (1, 2, 4, 8) for T in (512, 4096)]
GRID += [(SMALL, N, K, T) for N in (8, 16, 64) for K in (1, 2, 4) for T in (512, 4096)]
_UNCOUNTED = 2  # runs of each side before those that count
_NEAR_SECONDS = 3.0  # of the fastest form's runs, when forms near to each other are told apart


def main() -> None:
    """Arguments and wiring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="default: fp32")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="counted runs of each side (default: 7)")
    parser.add_argument("--skip-grid", action="store_true", help="leave out the comparison of the forms")
    parser.add_argument("--calibrate", action="store_true", help="print the device's rates for the cost model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, seconds and bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the forms' cost (needs matplotlib)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    check_arguments(given, {"repeats": 1}, given.json, given.plot)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda", "there is no GPU", "leave it out")
    for name in ("plot", "calibrate"):
        if given.skip_grid and getattr(given, name):
            raise UserError(f"--{name}", "needs the comparison of the forms", "leave out --skip-grid")
    if given.plot and find_spec("matplotlib") is None:
        raise UserError("--plot", "matplotlib is not installed", "bash launch/setup.sh bench")
    where = {"device": given.device, "dtype": DTYPES[given.dtype]}
    if given.memory_of:
        print(added_memory(given.memory_of, where))
        return

    device = device_name() if given.device == "cuda" else "cpu"
    found: dict[str, Any] = {"machine": machine(device), "dtype": given.dtype, "threads": torch.get_num_threads()}
    shapes = tqdm(shapes_of(given.dtype), "beside an expert", unit="shape", leave=False)
    found["branch"] = [beside_an_expert(N, K, T, given.repeats, where) for N, K, T in shapes]
    found["memory"] = memory_ratio(given.device, given.dtype)
    print(branch_table(found))
    if not given.skip_grid:
        grid = tqdm(GRID, "forms", unit="shape", leave=False)
        found["forms"] = [forms_of(sizes, N, K, T, given.repeats, where) for sizes, N, K, T in grid]
        # The published form makes weights for each token: neither N nor K changes what it costs.
        found["per_token"] = {T: per_token(T, given.repeats, where) for T in sorted({T for *_, T in GRID})}
        print(forms_table(found["forms"], found["per_token"]))
    if given.calibrate:
        print(calibration(found["forms"], where["dtype"]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(found, given.plot)


def shapes_of(dtype: str) -> list[tuple[int, int, int]]:
    """N, K and T of the comparisons with an expert; the published form takes gigabytes beyond them."""
    return [(8, 1, 2048), (8, 1, 8192), (8, 2, 2048)] if dtype == "fp32" else [(8, 1, 2048), (8, 1, 8192)]


def build(
    num_experts: int, layers: int, where: Mapping[str, Any], sizes: Sizes = PUBLISHED
) -> tuple[list[HyperExperts], HyperNetwork]:
    """The HyperExperts of some layers and the hypernetwork they share."""
    hypernetwork = HyperNetwork(sizes.hidden, WIDTH, layers, 10, sizes.bottleneck, sizes.adapter)
    branches = [HyperExperts(SelectionEncoder(num_experts, WIDTH, WIDTH, WIDTH), layer) for layer in range(layers)]
    for module in (hypernetwork, *branches):
        module.to(**where)
    return branches, hypernetwork


def selections(passes: int, layers: int, tokens: int, num_experts: int, top_k: int, device: str) -> Tensor:
    """Evenly spread selections [passes, layers, T, K]: in training too an expert has other tokens each time."""
    return torch.rand(passes, layers, tokens, num_experts, device=device).argsort(dim=-1)[..., :top_k]


def all_layers(
    branches: list[HyperExperts], hypernetwork: HyperNetwork, x_TD: Tensor, passes: Tensor, form: str
) -> Callable[[], None]:
    """Forward and backward of the HyperExperts of all layers, as in one pass of a model, with the next selections."""
    endless = itertools.cycle(passes)

    def run() -> None:
        selected = next(endless)
        modules_of: Sequence[HyperExpertWeights | None] = [None] * len(branches)
        if form == "auto":
            modules_of = generate_ahead(branches, hypernetwork, x_TD, selected.shape[-1]) or modules_of
        y_TD = x_TD
        for branch, selected_TK, modules in zip(branches, selected, modules_of, strict=True):
            y_TD = y_TD + branch(x_TD, selected_TK, hypernetwork, form, generated=modules)
        y_TD.backward(x_TD.detach())

    return without_gradients(run, hypernetwork, *branches)


def expert(where: Mapping[str, Any]) -> nn.Module:
    """One GELU expert of width 4D, as the published model's."""
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)).to(**where)


def medians(sides: Mapping[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each side; the sides run in turn, after two runs each that do not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides.items())
    for _ in range(repeats + _UNCOUNTED):
        order.reverse()  # else the same side always follows a large one, and finds what that left of the caches
        for name, run in order:
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: median(seconds[_UNCOUNTED:]) for name, seconds in times.items()}


def without_gradients(run: Callable[[], None], *modules: nn.Module) -> Callable[[], None]:
    """`run` with the gradients of the time before let go, as after an optimizer step."""

    def clean() -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)
        run()

    return clean


def beside_an_expert(N: int, K: int, T: int, repeats: int, where: Mapping[str, Any]) -> dict[str, Any]:
    """The branch of a layer, the hypernetwork shared by 12, beside one expert and the published form."""
    x_TD = torch.randn(T, D, **where).requires_grad_()
    passes = selections(repeats + _UNCOUNTED, LAYERS, T, N, K, where["device"])
    single = expert(where)
    branches, hypernetwork = build(N, LAYERS, where)
    sides = {
        "expert": without_gradients(lambda: single(x_TD).backward(x_TD.detach()), single),
        "branch": all_layers(branches, hypernetwork, x_TD, passes, "auto"),
    }
    if T <= 2048:
        sides["per_token"] = all_layers(branches[:1], hypernetwork, x_TD, passes[:, :1], "per_token")
    seconds = medians(sides, repeats, where["device"])
    seconds["branch"] /= LAYERS
    return {"N": N, "K": K, "T": T, "seconds": seconds}


def forms_of(sizes: Sizes, N: int, K: int, T: int, repeats: int, where: Mapping[str, Any]) -> dict[str, Any]:
    """The forms and `auto` in one layer by itself; those near the fastest run again, and more often."""
    x_TD = torch.randn(T, sizes.hidden, **where).requires_grad_()
    branches, hypernetwork = build(N, 1, where, sizes)

    def timed(forms: Iterable[str], runs: int) -> dict[str, float]:
        # Each form has its own: the first to see a selection would pay for what the library makes for its shapes.
        passes = {form: selections(runs + _UNCOUNTED, 1, T, N, K, where["device"]) for form in forms}
        sides = {form: all_layers(branches, hypernetwork, x_TD, passes[form], form) for form in passes}
        return medians(sides, runs, where["device"])

    seconds = timed(("per_set", "factored", "auto"), max(3, repeats // 2))
    fastest = min(seconds.values())
    near = [form for form in seconds if seconds[form] < 2 * fastest]
    seconds |= timed(near, min(5 * repeats, max(3, round(_NEAR_SECONDS / fastest))))
    sets = len({frozenset(row) for row in selections(1, 1, T, N, K, "cpu")[0, 0].tolist()})
    sets = math.comb(N, K) if branches[0].knows_selections(T, K, hypernetwork.sizes) else sets
    taken = cheaper_form(T, sets, sizes, x_TD.device.type, x_TD.dtype)
    return {"sizes": astuple(sizes), "N": N, "K": K, "T": T, "sets": sets, "taken": taken, "seconds": seconds}


def per_token(T: int, repeats: int, where: Mapping[str, Any]) -> float:
    """Median seconds of the published form in one layer by itself."""
    x_TD, passes = torch.randn(T, D, **where).requires_grad_(), selections(1, 1, T, 8, 1, where["device"])
    branches, hypernetwork = build(8, 1, where)
    run = all_layers(branches, hypernetwork, x_TD, passes, "per_token")
    return medians({"per_token": run}, max(3, repeats // 2), where["device"])["per_token"]


def added_memory(side: str, where: Mapping[str, Any]) -> int:
    """Most bytes that a side of 12 layers holds beside its parameters and input, N=8, K=1, T=2048."""
    x_TD, passes = torch.randn(2048, D, **where).requires_grad_(), selections(1, LAYERS, 2048, 8, 1, where["device"])
    torch.autograd.backward([expert(where)(x_TD[:64])], [x_TD[:64].detach()])  # what libraries allocate once
    if side == "branch":
        branches, hypernetwork = build(8, LAYERS, where)
        base = held(where["device"])
        all_layers(branches, hypernetwork, x_TD, passes, "auto")()
    else:
        experts = [expert(where) for _ in range(LAYERS)]
        base = held(where["device"])
        y_TD = x_TD
        for each in experts:
            y_TD = y_TD + each(x_TD)
        y_TD.backward(x_TD.detach())
    return held(where["device"]) - base


def held(device: str) -> int:
    """Most bytes held so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # not getrusage, which counts the parent's peak too
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def memory_ratio(device: str, dtype: str) -> dict[str, int]:
    """`added_memory` of both sides, each in a process of its own.

    There every tensor is mapped by itself, so that live tensors are counted and not the holes of a heap.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--device", device, "--dtype", dtype, "--memory-of"]
    return {side: int(subprocess.check_output([*command, side], env=environment)) for side in ("expert", "branch")}


def branch_table(found: Mapping[str, Any]) -> str:
    """Ratios first."""
    rows = [
        "| N, K, T | branch / expert | published / branch | expert, ms | branch, ms | published, ms |",
        "| --- |" + " ---: |" * 5,
    ]
    for case in found["branch"]:
        t = case["seconds"]
        numbers = [t["branch"] / t["expert"], math.nan, t["expert"] * 1e3, t["branch"] * 1e3, math.nan]
        if "per_token" in t:
            numbers[1], numbers[4] = t["per_token"] / t["branch"], t["per_token"] * 1e3
        shown = [form.format(number) for form, number in zip(("{:.3f}", *["{:.1f}"] * 4), numbers, strict=True)]
        rows.append(f"| {case['N']}, {case['K']}, {case['T']} | {' | '.join(shown)} |".replace("nan", "-"))
    memory = found["memory"]
    rows += [
        "",
        f"memory added, branch / expert: {memory['branch'] / memory['expert']:.3f} "
        f"({memory['branch'] / 2**20:.0f} / {memory['expert'] / 2**20:.0f} MiB for {LAYERS} layers)",
        f"{found['dtype']}, D, A, B = {astuple(PUBLISHED)}, generation shared by {LAYERS} layers, "
        f"threads {found['threads']} | " + " | ".join(f"{key} {value}" for key, value in found["machine"].items()),
    ]
    return "\n".join(rows) + "\n"


def forms_table(forms: list[dict[str, Any]], published: Mapping[int, float]) -> str:
    """`auto` beside the best form for each shape."""
    rows = [
        "| D, A, B | N | K | T | sets | taken | auto / best | auto, ms | per_set, ms | factored, ms | per_token, ms |",
        "| --- |" + " ---: |" * 4 + " --- |" + " ---: |" * 5,
    ]
    for case in forms:
        t = case["seconds"]
        known = f"{published[case['T']] * 1e3:.0f}" if case["sizes"] == astuple(PUBLISHED) else "-"
        rows.append(
            f"| {', '.join(map(str, case['sizes']))} | {case['N']} | {case['K']} | {case['T']} | {case['sets']} | "
            f"{case['taken']} | {t['auto'] / min(t['per_set'], t['factored']):.2f} | "
            + " | ".join(f"{t[form] * 1e3:.1f}" for form in ("auto", "per_set", "factored"))
            + f" | {known} |"
        )
    return "\n".join(rows) + "\n"


def calibration(forms: list[dict[str, Any]], dtype: torch.dtype) -> str:
    """Rates that fit the forms' times best, by least squares of the relative error, none negative.

    Errors count the more, the more alike both forms are: far from there they change no choice.
    """
    rows, times, weights = [], [], []
    for case in forms:
        sizes = Sizes(*case["sizes"])
        for form, cost in (
            ("per_set", cost_per_set(case["T"], case["sets"], sizes)),
            ("factored", cost_factored(case["T"], sizes)),
        ):
            rows.append([cost.flops, cost.elements * dtype.itemsize, cost.products])
            times.append(case["seconds"][form])
            both = (case["seconds"]["per_set"], case["seconds"]["factored"])
            weights.append(min(both) / max(both))
    seconds = torch.tensor(times, dtype=torch.float64)
    weight = torch.tensor(weights, dtype=torch.float64)
    scaled = torch.tensor(rows, dtype=torch.float64) * (weight / seconds).unsqueeze(1)
    size = scaled.norm(dim=0)
    share = torch.zeros(3, dtype=torch.float64)
    step = 1 / torch.linalg.matrix_norm(scaled / size, 2) ** 2
    for _ in range(20000):  # projected gradient
        share = (share - step * (scaled / size).T @ (scaled / size @ share - weight)).clamp_min(0)
    flops, moved, start = (share / size).tolist()
    return f"flops {1 / max(flops, 1e-30):.3g}/s, bytes {1 / max(moved, 1e-30):.3g}/s, start {start:.3g} s"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Seconds of each form against the number of sets, one picture for each T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    published = [case for case in found["forms"] if case["sizes"] == astuple(PUBLISHED)]
    lengths = sorted({case["T"] for case in published})
    for axes, length in zip(figure.subplots(1, len(lengths)), lengths, strict=True):
        cases = sorted((case for case in published if case["T"] == length), key=lambda case: case["sets"])
        for form, style in (("per_set", "o-"), ("factored", "s-"), ("auto", "k--")):
            milliseconds = [case["seconds"][form] * 1e3 for case in cases]
            axes.plot([case["sets"] for case in cases], milliseconds, style, label=form)
        axes.axhline(found["per_token"][length] * 1e3, color="tab:red", label="per_token")
        for case in cases:
            axes.annotate(
                f"{case['N']}/{case['K']}", (case["sets"], case["seconds"]["auto"] * 1e3), fontsize=7, rotation=45
            )
        axes.set(xscale="log", yscale="log", xlabel="sets generated", ylabel="forward and backward, ms")
        axes.set_title(f"T = {length}, {found['dtype']} (labels: N/K)")
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with one_line_errors():
        main()
