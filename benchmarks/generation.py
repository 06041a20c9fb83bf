"""Compare the generation speed of three models, called sides.

The sides are HyperMoE with a hypernetwork, HyperMoE with baked HyperExperts, and the plain Mixture of Experts. Their
runs alternate. Weights and prompts are random.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hypermoe_ds.device import uses_gpu
from hypermoe_ds.export.bake import bake
from hypermoe_ds.modeling import PRESETS, HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.process import one_line_errors
from results import check_arguments, device_name, machine, machine_line

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt2-small-8e", choices=list(PRESETS), help="default: gpt2-small-8e")
    parser.add_argument("--dtype", default="fp32", choices=list(_DTYPES), help="default: fp32")
    parser.add_argument("--prompt", type=int, default=64, metavar="TOKENS", help="length of the prompt (default: 64)")
    parser.add_argument("--new", type=int, default=64, metavar="TOKENS", help="tokens to generate (default: 64)")
    parser.add_argument("--batch", type=int, default=1, metavar="SEQUENCES", help="sequences per batch (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measured runs of each side (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds of every run")
    arguments = parser.parse_args()
    check_arguments(arguments, dict.fromkeys(("prompt", "new", "batch", "repeats"), 1), arguments.json)

    device = "cuda" if uses_gpu() else "cpu"
    sides = build_sides(arguments.preset, device, _DTYPES[arguments.dtype])
    vocab_size = sides["moe"].config.vocab_size
    prompt = torch.randint(0, vocab_size, (arguments.batch, arguments.prompt), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides.items())
    for repeat in range(arguments.repeats + 1):
        order.append(order.pop(0))
        for name, model in order:
            elapsed = generate(model, prompt, arguments.new)
            if repeat:  # the first run is a warm-up
                seconds[name].append(elapsed)
    print(as_table(seconds, arguments.batch * arguments.new))
    print(
        f"{arguments.preset}, {arguments.dtype}, batch {arguments.batch}, prompt {arguments.prompt}, "
        f"{arguments.new} new tokens, threads {torch.get_num_threads()} | {machine_line(device_name())}"
    )
    if arguments.json:
        content = {"seconds": seconds, "machine": machine(device_name())}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def build_sides(preset: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Build the three models, in evaluation mode."""
    hypermoe = HyperMoEForCausalLM(HyperMoEConfig(**PRESETS[preset])).to(device, dtype).eval()
    plain = HyperMoEForCausalLM(HyperMoEConfig(**{**PRESETS[preset], "hypernetwork": False})).to(device, dtype).eval()
    return {"hypermoe": hypermoe, "baked": bake(hypermoe), "moe": plain}


def generate(model: Any, prompt: torch.Tensor, new: int) -> float:
    """Generate greedily with a KV cache and return the time in seconds."""
    began = time.perf_counter()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def as_table(seconds: Mapping[str, list[float]], tokens: int) -> str:
    """Format the results as a Markdown table."""
    base = median(seconds["moe"])
    rows = ["| side | time / moe | tokens/s | median s (min, max) |", "| --- |" + " ---: |" * 3]
    for name, runs in seconds.items():
        middle = median(runs)
        spread = f"{middle:.3f} ({min(runs):.3f}, {max(runs):.3f})"
        rows.append(f"| {name} | {middle / base:.3f} | {tokens / middle:,.1f} | {spread} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    with one_line_errors():
        main()
