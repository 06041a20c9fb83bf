"""How much of a HyperExpert's time is hidden beside the experts' on one GPU; a waiting kernel stands in for the experts
and their all-to-all. Times one MoE layer's forward pass with and without the overlap, and writes a trace."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hypermoe_ds.errors import UserError, one_line_errors
from hypermoe_ds.modeling import PRESETS, HyperMoEConfig, HyperMoEForCausalLM

_REPEATS, _CALIBRATION_CYCLES = 20, 10_000_000


def main() -> None:
    """Arguments and wiring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt2-small-8e", choices=list(PRESETS), help="default: gpt2-small-8e")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the pass (default: 8192)")
    parser.add_argument("--wait", type=float, default=3.0, metavar="MS", help="the experts' side, ms (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times, ms")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="write a trace for chrome://tracing")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU", "the overlap is one of CUDA streams", "run it on a machine with an NVIDIA GPU")

    from hypermoe_ds.parallel.overlap import overlap_hyper_experts  # noqa: PLC0415 (needless where refused)

    model, hidden_BSD = one_layer(given.preset, given.tokens)
    cycles = int(_CALIBRATION_CYCLES * given.wait / milliseconds(lambda: torch.cuda._sleep(_CALIBRATION_CYCLES)))
    block = model.model.layers[0].mlp
    block.experts.forward = lambda x_RD, *_args, **_kwargs: (torch.cuda._sleep(cycles), x_RD)[1]

    found = {}
    for name, enabled in (("with", True), ("without", False)):
        overlap_hyper_experts(model, enabled)
        found[f"{name}_overlap_ms"] = milliseconds(lambda: model.model(inputs_embeds=hidden_BSD, use_cache=False))
        if given.trace is not None:
            write_trace(model, hidden_BSD, given.trace.with_suffix(f".{name}_overlap.json"))
    found["wait_ms"] = given.wait
    found["hyper_experts_ms"] = milliseconds(lambda: hyper_experts_alone(model, hidden_BSD))
    saved = found["without_overlap_ms"] - found["with_overlap_ms"]
    found["hidden_share"] = saved / found["hyper_experts_ms"]
    print("| " + " | ".join(found) + " |\n|" + " ---: |" * len(found))
    print("| " + " | ".join(f"{value:.3f}" for value in found.values()) + " |")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def one_layer(preset: str, tokens: int) -> tuple[Any, Tensor]:
    """A model of one MoE layer in bf16 on the GPU, and the input of that layer."""
    fields = {**PRESETS[preset], "num_hidden_layers": 1, "first_dense_layers": 0}
    model = HyperMoEForCausalLM(HyperMoEConfig(**fields)).to("cuda", torch.bfloat16)
    hidden_BSD = torch.randn(1, tokens, fields["hidden_size"], device="cuda", dtype=torch.bfloat16)
    return model, hidden_BSD


def hyper_experts_alone(model: Any, hidden_BSD: Tensor) -> Tensor:
    """The HyperExperts by themselves, on evenly spread selections."""
    config = model.config
    x_TD = hidden_BSD.flatten(0, 1)
    first_T = torch.arange(x_TD.shape[0], device=x_TD.device) % config.num_experts
    offset_K = torch.arange(config.num_experts_per_tok, device=x_TD.device)
    selected_TK = (first_T.unsqueeze(1) + offset_K) % config.num_experts
    y_TD: Tensor = model.model.layers[0].hyper_experts(x_TD, selected_TK, model.model.hypernetwork)
    return y_TD


@torch.no_grad()
def milliseconds(work: Callable[[], object]) -> float:
    """Median GPU time of `work`, after as many runs that do not count."""
    times = []
    for _ in range(2 * _REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times[_REPEATS:])


@torch.no_grad()
def write_trace(model: Any, hidden_BSD: Tensor, path: Path) -> None:
    """One pass as a Chrome trace: the waiting kernel and the HyperExpert's, on their streams."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        model.model(inputs_embeds=hidden_BSD, use_cache=False)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


if __name__ == "__main__":
    with one_line_errors():
        main()
