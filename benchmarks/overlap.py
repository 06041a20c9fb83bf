"""Measure on one GPU how much of the HyperExpert computation overlaps with the experts of the layer.

In this benchmark, a kernel that only waits replaces the experts and their all-to-all. The script times the forward and
backward pass of one MoE layer with and without the overlap, checks that both give the same results, and writes traces.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import PRESETS, HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.generated import HyperExpertWeights
from hypermoe_ds.modeling.hyper_experts import generate_ahead
from hypermoe_ds.process import one_line_errors

_REPEATS, _CALIBRATION_CYCLES = 20, 10_000_000
_OVERLAP = {"with": True, "without": False}


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt2-small-8e", choices=list(PRESETS), help="default: gpt2-small-8e")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per micro-batch (default: 8192)")
    parser.add_argument(
        "--wait",
        type=float,
        default=3.0,
        metavar="MS",
        help="waiting time that replaces the experts in each forward and each backward pass (default: 3)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the times in ms to")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="write traces for chrome://tracing")
    arguments = parser.parse_args()
    if not uses_gpu():
        raise UserError(
            "no GPU", "the overlap needs CUDA streams", "run this benchmark on a machine with an NVIDIA GPU"
        )

    from hypermoe_ds.parallel.overlap import overlap_hyper_experts

    model, hidden_BSD = one_layer(arguments.preset, arguments.tokens)
    cycles = int(_CALIBRATION_CYCLES * arguments.wait / milliseconds(lambda: torch.cuda._sleep(_CALIBRATION_CYCLES)))
    experts_only_wait(model, cycles)

    found: dict[str, float] = {}
    values = {}
    for name, enabled in _OVERLAP.items():
        overlap_hyper_experts(model, enabled)
        with sdpa_kernel(SDPBackend.MATH):  # cuDNN's attention gradients are not deterministic
            values[name] = value_and_gradients(model, hidden_BSD)
        found[f"{name}_overlap_ms"] = milliseconds(lambda: value_and_gradients(model, hidden_BSD))
    if not all(map(torch.equal, values["with"], values["without"])):
        raise UserError("with and without overlap", "results differ", "set parallel.overlap_hyper_experts=false")
    found["wait_ms"] = 2 * arguments.wait
    found["hyper_experts_ms"] = hyper_experts_alone(model, hidden_BSD)
    found["hidden_share"] = (found["without_overlap_ms"] - found["with_overlap_ms"]) / found["hyper_experts_ms"]
    print("| " + " | ".join(found) + " |\n|" + " ---: |" * len(found))
    print("| " + " | ".join(f"{value:.3f}" for value in found.values()) + " |")
    print("\nOutputs and gradients with and without the overlap are bitwise identical.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, enabled in _OVERLAP.items() if arguments.trace is not None else ():
        overlap_hyper_experts(model, enabled)
        write_trace(model, hidden_BSD, arguments.trace.with_suffix(f".{name}_overlap.json"))


def one_layer(preset: str, tokens: int) -> tuple[Any, Tensor]:
    """Build a model with one MoE layer in bf16 on the GPU, and an input for the layer."""
    fields = {**PRESETS[preset], "num_hidden_layers": 1, "first_dense_layers": 0}
    model = HyperMoEForCausalLM(HyperMoEConfig(**fields)).to("cuda", torch.bfloat16)
    hidden_BSD = torch.randn(1, tokens, fields["hidden_size"], device="cuda", dtype=torch.bfloat16)
    return model, hidden_BSD.requires_grad_()


def experts_only_wait(model: Any, cycles: int) -> None:
    """Replace the experts with an identity function that waits for `cycles` GPU cycles in each pass."""

    def wait(x_RD: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        torch.cuda._sleep(cycles)
        y_RD = x_RD.view_as(x_RD)
        y_RD.register_hook(lambda _grad_RD: torch.cuda._sleep(cycles))
        return y_RD

    model.model.layers[0].mlp.experts.forward = wait


def value_and_gradients(model: Any, hidden_BSD: Tensor) -> list[Tensor]:
    """Run the layer; return its output and the gradients of its input and of the hypernetwork."""
    y_BSD = model.model(inputs_embeds=hidden_BSD, use_cache=False).last_hidden_state
    inputs = (hidden_BSD, *model.model.hypernetwork.parameters())
    return [y_BSD, *torch.autograd.grad(y_BSD, inputs, hidden_BSD.detach())]


def hyper_experts_alone(model: Any, hidden_BSD: Tensor) -> float:
    """Return the milliseconds that applying the HyperExperts takes, with uniform selections.

    Only this time can overlap with the experts, so the time to generate the HyperExperts is not included.
    """
    config, layer, hypernetwork = model.config, model.model.layers[0].hyper_experts, model.model.hypernetwork
    x_TD = hidden_BSD.detach().flatten(0, 1).requires_grad_()
    first_T = torch.arange(x_TD.shape[0], device=x_TD.device) % config.num_experts
    offset_K = torch.arange(config.num_experts_per_tok, device=x_TD.device)
    selected_TK = (first_T.unsqueeze(1) + offset_K) % config.num_experts
    generated = generate_ahead([layer], hypernetwork, x_TD, config.num_experts_per_tok)
    if generated is None:
        raise UserError(
            f"--tokens {len(x_TD)}", "are too few to generate HyperExperts before routing", "give more tokens"
        )
    weights = HyperExpertWeights(*(weight.detach().requires_grad_() for weight in generated[0]))

    def run() -> None:
        y_TD = layer(x_TD, selected_TK, hypernetwork, generated=weights)
        torch.autograd.grad(y_TD, (x_TD, *weights), x_TD.detach())

    return milliseconds(run)


def milliseconds(work: Callable[[], object]) -> float:
    """Return the median GPU time of `work` in milliseconds, after an equal number of warm-up runs."""
    times: list[float] = []
    for _ in range(2 * _REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times[_REPEATS:])


def write_trace(model: Any, hidden_BSD: Tensor, path: Path) -> None:
    """Write a Chrome trace of one forward and backward pass."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        value_and_gradients(model, hidden_BSD)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


if __name__ == "__main__":
    with one_line_errors():
        main()
