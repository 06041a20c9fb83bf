"""Compare the time and memory of HyperExperts with those of one expert, and compare the forms of HyperExperts.

Each measurement is one forward and backward pass. To compare times, both sides alternate in one process. Memory is
measured in a separate process for each side.

    python benchmarks/hyper_experts.py [--dtype bf16] [--json FILE] [--plot FILE.png]

The benchmark takes 15 minutes on 2 cores in fp32, or 2 minutes with --skip-grid.
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
from dataclasses import asdict, astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling.generated import HyperExpertWeights
from hypermoe_ds.modeling.hyper_costs import Sizes, cheaper_form, cost_factored, cost_per_selection
from hypermoe_ds.modeling.hyper_experts import HyperExperts, HyperNetwork, SelectionEncoder, generate_ahead
from hypermoe_ds.process import one_line_errors
from results import check_arguments, device_name, machine, machine_line

PUBLISHED, SMALL = Sizes(768, 64, 128), Sizes(256, 16, 64)  # D, A, B of gpt2-small-8e and tiny-10m
D, LAYERS, WIDTH = PUBLISHED.hidden, 12, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID = [(PUBLISHED, N, K, T) for N in (8, 16, 64) for K in (1, 2, 4, 8) for T in (512, 4096)]
GRID += [(SMALL, N, K, T) for N in (8, 16, 64) for K in (1, 2, 4) for T in (512, 4096)]
_WARMUP = 2  # warm-up runs of each side before the measured runs
_CLOSE_FORMS_SECONDS = 3.0  # duration of the additional runs of the fastest form, which rank forms with similar times


class Target(NamedTuple):
    """Device and dtype of all tensors in a measurement."""

    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpertCase:
    """Median seconds of one layer, for N experts, K experts per token and T tokens.

    Attributes:
        published: seconds of the published form; None if it needs too much memory.
    """

    N: int
    K: int
    T: int
    expert: float
    hyper_expert: float
    published: float | None


@dataclass(frozen=True)
class FormCase:
    """Median seconds of each exact form in one layer.

    Attributes:
        sizes: D, A and B of the hypernetwork.
        selections: number of different selections for which HyperExperts are generated.
        predicted: the form that the cost model predicts to be cheaper.
        seconds: median seconds of the forms "per_set", "factored" and "auto".
    """

    sizes: Sizes
    N: int
    K: int
    T: int
    selections: int
    predicted: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class Results:
    """Results of the benchmark. `per_token` maps the number of tokens to the seconds of the published form."""

    machine: dict[str, Any]
    dtype: str
    threads: int
    experts: list[ExpertCase]
    memory: dict[str, int]
    forms: list[FormCase]
    per_token: dict[int, float]


def main() -> None:
    """Run the benchmark, or measure the memory of one side in a subprocess."""
    arguments = parse_arguments()
    target = Target(arguments.device, DTYPES[arguments.dtype])
    if arguments.memory_of:
        print(added_memory(arguments.memory_of, target))
        return
    results = measure(arguments, target)
    if arguments.calibrate:
        print(calibration(results.forms, target.dtype))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(results, arguments.plot)


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="default: fp32")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="measured runs of each side (default: 7)")
    parser.add_argument("--skip-grid", action="store_true", help="skip the comparison of the forms")
    parser.add_argument("--calibrate", action="store_true", help="print the rates of this device for the cost model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results: seconds and bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the cost of the forms (needs matplotlib)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_arguments(arguments, {"repeats": 1}, arguments.json, arguments.plot)
    if arguments.device == "cuda" and not uses_gpu():
        raise UserError("--device=cuda", "there is no GPU", "omit the option")
    for name in ("plot", "calibrate"):
        if arguments.skip_grid and getattr(arguments, name):
            raise UserError(f"--{name}", "needs the comparison of the forms", "omit --skip-grid")
    if arguments.plot and find_spec("matplotlib") is None:
        raise UserError("--plot", "matplotlib is not installed", "bash launch/setup.sh bench")
    return arguments


def measure(arguments: argparse.Namespace, target: Target) -> Results:
    """Run all requested measurements and print each table as soon as it is complete."""
    repeats = arguments.repeats
    device = device_name() if target.device == "cuda" else "cpu"
    shapes = tqdm(expert_shapes(arguments.dtype), "experts", unit="shape", leave=False)
    experts = [compare_with_expert(N, K, T, repeats, target) for N, K, T in shapes]
    memory = memory_of_both(arguments.device, arguments.dtype)
    print(expert_table(experts, memory, arguments.dtype, device))
    forms: list[FormCase] = []
    published: dict[int, float] = {}
    if not arguments.skip_grid:
        grid = tqdm(GRID, "forms", unit="shape", leave=False)
        forms = [compare_forms(sizes, N, K, T, repeats, target) for sizes, N, K, T in grid]
        # The published form generates weights for each token, so its cost depends on neither N nor K.
        published = {T: per_token(T, repeats, target) for T in sorted({T for *_, T in GRID})}
        print(forms_table(forms, published))
    threads = torch.get_num_threads()
    return Results(machine(device), arguments.dtype, threads, experts, memory, forms, published)


def expert_shapes(dtype: str) -> list[tuple[int, int, int]]:
    """Return N, K and T of each comparison with an expert."""
    return [(8, 1, 2048), (8, 1, 8192), (8, 2, 2048)] if dtype == "fp32" else [(8, 1, 2048), (8, 1, 8192)]


def build(
    num_experts: int, layers: int, target: Target, sizes: Sizes = PUBLISHED
) -> tuple[list[HyperExperts], HyperNetwork]:
    """Build the HyperExperts of several layers and their shared hypernetwork."""
    hypernetwork = HyperNetwork(sizes.hidden, WIDTH, layers, 10, sizes.bottleneck, sizes.adapter)
    layers_of = [HyperExperts(SelectionEncoder(num_experts, WIDTH, WIDTH, WIDTH), layer) for layer in range(layers)]
    for module in (hypernetwork, *layers_of):
        module.to(**target._asdict())
    return layers_of, hypernetwork


def selections(passes: int, layers: int, tokens: int, num_experts: int, top_k: int, device: str) -> Tensor:
    """Draw uniform random selections [passes, layers, T, K]. As in training, each pass has different selections."""
    return torch.rand(passes, layers, tokens, num_experts, device=device).argsort(dim=-1)[..., :top_k]


def all_layers(
    layers: list[HyperExperts], hypernetwork: HyperNetwork, x_TD: Tensor, passes: Tensor, form: str
) -> Callable[[], None]:
    """Return a function that runs the HyperExperts of all layers forward and backward, with new selections per call."""
    endless = itertools.cycle(passes)

    def run() -> None:
        selected = next(endless)
        weights_of: Sequence[HyperExpertWeights | None] = [None] * len(layers)
        if form == "auto":
            weights_of = generate_ahead(layers, hypernetwork, x_TD, selected.shape[-1]) or weights_of
        y_TD = x_TD
        for layer, selected_TK, weights in zip(layers, selected, weights_of, strict=True):
            y_TD = y_TD + layer(x_TD, selected_TK, hypernetwork, form, generated=weights)
        y_TD.backward(x_TD.detach())

    return without_gradients(run, hypernetwork, *layers)


def expert(target: Target) -> nn.Module:
    """Build an expert with a GELU MLP of width 4D, as in the published model."""
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)).to(**target._asdict())


def medians(sides: Mapping[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Return the median seconds of each side. The sides alternate and begin with two warm-up runs each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides.items())
    for _ in range(repeats + _WARMUP):
        order.reverse()  # so that no side always follows the same other side
        for name, run in order:
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: median(seconds[_WARMUP:]) for name, seconds in times.items()}


def without_gradients(run: Callable[[], None], *modules: nn.Module) -> Callable[[], None]:
    """Return a function that frees the gradients of the previous run, as an optimizer step does, and calls `run`."""

    def clean() -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)
        run()

    return clean


def compare_with_expert(N: int, K: int, T: int, repeats: int, target: Target) -> ExpertCase:
    """Compare the cost of a layer's HyperExperts with that of one expert and with that of the published form.

    The hypernetwork is shared by 12 layers.
    """
    x_TD = torch.randn(T, D, **target._asdict()).requires_grad_()
    passes = selections(repeats + _WARMUP, LAYERS, T, N, K, target.device)
    single = expert(target)
    layers, hypernetwork = build(N, LAYERS, target)
    sides = {
        "expert": without_gradients(lambda: single(x_TD).backward(x_TD.detach()), single),
        "hyper_expert": all_layers(layers, hypernetwork, x_TD, passes, "auto"),
    }
    if T <= 2048:  # with more tokens, the published form needs gigabytes of memory
        sides["published"] = all_layers(layers[:1], hypernetwork, x_TD, passes[:, :1], "per_token")
    seconds = medians(sides, repeats, target.device)
    return ExpertCase(N, K, T, seconds["expert"], seconds["hyper_expert"] / LAYERS, seconds.get("published"))


def compare_forms(sizes: Sizes, N: int, K: int, T: int, repeats: int, target: Target) -> FormCase:
    """Compare the exact forms and `auto` in one layer. Forms with times close to the fastest are measured again."""
    x_TD = torch.randn(T, sizes.hidden, **target._asdict()).requires_grad_()
    layers, hypernetwork = build(N, 1, target, sizes)

    def measure_forms(forms: Iterable[str], runs: int) -> dict[str, float]:
        # Draw different selections for each form, because libraries compile or allocate at the first use of a shape.
        passes = {form: selections(runs + _WARMUP, 1, T, N, K, target.device) for form in forms}
        sides = {form: all_layers(layers, hypernetwork, x_TD, passes[form], form) for form in passes}
        return medians(sides, runs, target.device)

    seconds = measure_forms(("per_set", "factored", "auto"), max(3, repeats // 2))
    fastest = min(seconds.values())
    close = [form for form in seconds if seconds[form] < 2 * fastest]
    seconds |= measure_forms(close, min(5 * repeats, max(3, round(_CLOSE_FORMS_SECONDS / fastest))))
    count = len({frozenset(row) for row in selections(1, 1, T, N, K, "cpu")[0, 0].tolist()})
    if layers[0].knows_selections(T, K, hypernetwork.sizes):
        count = math.comb(N, K)
    predicted = cheaper_form(T, count, sizes, x_TD.device.type, x_TD.dtype)
    return FormCase(sizes, N, K, T, count, predicted, seconds)


def per_token(T: int, repeats: int, target: Target) -> float:
    """Return the median seconds of the published form in one layer."""
    x_TD = torch.randn(T, D, **target._asdict()).requires_grad_()
    layers, hypernetwork = build(8, 1, target)
    run = all_layers(layers, hypernetwork, x_TD, selections(1, 1, T, 8, 1, target.device), "per_token")
    return medians({"per_token": run}, max(3, repeats // 2), target.device)["per_token"]


def added_memory(side: str, target: Target) -> int:
    """Return the peak memory, in bytes, that one pass of 12 layers adds to parameters and input (N=8, K=1, T=2048)."""
    x_TD = torch.randn(2048, D, **target._asdict()).requires_grad_()
    passes = selections(1, LAYERS, 2048, 8, 1, target.device)
    torch.autograd.backward([expert(target)(x_TD[:64])], [x_TD[:64].detach()])  # triggers one-time allocations
    if side == "hyper_expert":
        layers, hypernetwork = build(8, LAYERS, target)
        base = peak_bytes(target.device)
        all_layers(layers, hypernetwork, x_TD, passes, "auto")()
    else:
        experts = [expert(target) for _ in range(LAYERS)]
        base = peak_bytes(target.device)
        y_TD = x_TD
        for each in experts:
            y_TD = y_TD + each(x_TD)
        y_TD.backward(x_TD.detach())
    return peak_bytes(target.device) - base


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process, in bytes: on CUDA, the memory allocated on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # getrusage would include the parent process's peak
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def memory_of_both(device: str, dtype: str) -> dict[str, int]:
    """Return `added_memory` of both sides, each measured in its own process.

    The processes allocate each large tensor with mmap, so that the peak memory does not include heap fragmentation.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--device", device, "--dtype", dtype, "--memory-of"]
    return {
        side: int(subprocess.check_output([*command, side], env=environment)) for side in ("expert", "hyper_expert")
    }


def expert_table(cases: list[ExpertCase], memory: Mapping[str, int], dtype: str, device: str) -> str:
    """Format the comparison of HyperExperts with one expert as a Markdown table."""
    rows = [
        "| N, K, T | HyperExpert / expert | published / HyperExpert | expert, ms | HyperExpert, ms | published, ms |",
        "| --- |" + " ---: |" * 5,
    ]
    for case in cases:
        ratio, published = "-", "-"
        if case.published is not None:
            ratio, published = f"{case.published / case.hyper_expert:.1f}", f"{case.published * 1e3:.1f}"
        rows.append(
            f"| {case.N}, {case.K}, {case.T} | {case.hyper_expert / case.expert:.3f} | {ratio} | "
            f"{case.expert * 1e3:.1f} | {case.hyper_expert * 1e3:.1f} | {published} |"
        )
    rows += [
        "",
        f"added memory, HyperExpert / expert: {memory['hyper_expert'] / memory['expert']:.3f} "
        f"({memory['hyper_expert'] / 2**20:.0f} / {memory['expert'] / 2**20:.0f} MiB for {LAYERS} layers)",
        f"{dtype}, D, A, B = {astuple(PUBLISHED)}, generation shared by {LAYERS} layers, "
        f"threads {torch.get_num_threads()} | {machine_line(device)}",
    ]
    return "\n".join(rows) + "\n"


def forms_table(forms: list[FormCase], published: Mapping[int, float]) -> str:
    """Format the comparison of the forms for each shape as a Markdown table."""
    rows = [
        "| D, A, B | N | K | T | selections | predicted | auto / best | auto, ms | per_set, ms | factored, ms "
        "| per_token, ms |",
        "| --- |" + " ---: |" * 4 + " --- |" + " ---: |" * 5,
    ]
    for case in forms:
        t = case.seconds
        known = f"{published[case.T] * 1e3:.0f}" if case.sizes == PUBLISHED else "-"
        rows.append(
            f"| {', '.join(map(str, astuple(case.sizes)))} | {case.N} | {case.K} | {case.T} | {case.selections} | "
            f"{case.predicted} | {t['auto'] / min(t['per_set'], t['factored']):.2f} | "
            + " | ".join(f"{t[form] * 1e3:.1f}" for form in ("auto", "per_set", "factored"))
            + f" | {known} |"
        )
    return "\n".join(rows) + "\n"


def calibration(forms: list[FormCase], dtype: torch.dtype) -> str:
    """Fit the rates of the cost model to the measured times.

    This is a non-negative least-squares fit of the relative error. Cases whose forms take similar times have more
    weight, because an error in these cases can change the choice of the form.
    """
    rows, times, weights = [], [], []
    for case in forms:
        for form, cost in (
            ("per_set", cost_per_selection(case.T, case.selections, case.sizes)),
            ("factored", cost_factored(case.T, case.sizes)),
        ):
            rows.append([cost.flops, cost.elements * dtype.itemsize, cost.products])
            times.append(case.seconds[form])
            both = (case.seconds["per_set"], case.seconds["factored"])
            weights.append(min(both) / max(both))
    seconds = torch.tensor(times, dtype=torch.float64)
    weight = torch.tensor(weights, dtype=torch.float64)
    scaled = torch.tensor(rows, dtype=torch.float64) * (weight / seconds).unsqueeze(1)
    size = scaled.norm(dim=0)
    share = torch.zeros(3, dtype=torch.float64)
    step = 1 / torch.linalg.matrix_norm(scaled / size, 2) ** 2
    for _ in range(20000):  # projected gradient descent
        share = (share - step * (scaled / size).T @ (scaled / size @ share - weight)).clamp_min(0)
    flops, moved, start = (share / size).tolist()
    return f"flops {1 / max(flops, 1e-30):.3g}/s, bytes {1 / max(moved, 1e-30):.3g}/s, start {start:.3g} s"


def plot(results: Results, path: Path) -> None:
    """Plot the time of each form against the number of selections, one chart for each T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    published = [case for case in results.forms if case.sizes == PUBLISHED]
    lengths = sorted({case.T for case in published})
    for axes, length in zip(figure.subplots(1, len(lengths)), lengths, strict=True):
        cases = sorted((case for case in published if length == case.T), key=lambda case: case.selections)
        for form, style in (("per_set", "o-"), ("factored", "s-"), ("auto", "k--")):
            axes.plot(
                [case.selections for case in cases], [case.seconds[form] * 1e3 for case in cases], style, label=form
            )
        axes.axhline(results.per_token[length] * 1e3, color="tab:red", label="per_token")
        for case in cases:
            axes.annotate(f"{case.N}/{case.K}", (case.selections, case.seconds["auto"] * 1e3), fontsize=7, rotation=45)
        axes.set(xscale="log", yscale="log", xlabel="selections", ylabel="forward and backward, ms")
        axes.set_title(f"T = {length}, {results.dtype} (labels: N/K)")
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with one_line_errors():
        main()
