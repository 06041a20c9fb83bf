"""Compare whole training steps: the sides step in turn, each in processes of its own, on random token ids.

Sides: hypermoe; moe (the same model without HyperExperts); per_token (HyperMoE with a HyperExpert generated for each
token, the published form); mixtral (Transformers' Mixtral at the same shape in a plain torch loop); deepspeed_moe (the
same decoder with DeepSpeed's older, dropless MoE layer). Ratios are to moe where it takes part, else to the last side.
A key=value changes a field of the preset's model, such as num_hidden_layers=2.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch

from hypermoe_ds.config import apply_overrides, closest
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import PRESETS, ConfigurationError, HyperMoEConfig
from hypermoe_ds.parallel.topology import check_expert_parallel
from hypermoe_ds.process import one_line_errors
from op_shares import markdown
from rank_processes import Ranks, answers_of, ask, started
from results import check_arguments, result, text

SIDES = ("hypermoe", "moe", "mixtral", "deepspeed_moe", "per_token")
_AT_LEAST = dict.fromkeys(("ranks", "expert_parallel", "sequence_length", "steps", "threads", "micro_batch_size"), 1)
_AT_LEAST |= {"warmup": 0, "in_turns": 0, "accumulation": 1}
_RECOMPUTE = ("hypermoe", "moe", "per_token")
_PROFILED_STEPS, _LARGEST_MICRO_BATCH, _ROUNDS = 3, 64, 2


def main() -> None:
    """Check, measure, report."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks' too
    arguments = parse_arguments()
    settings = settings_of(arguments)
    sides, ranks, threads = arguments.sides.split(","), arguments.ranks, arguments.threads
    config = HyperMoEConfig(**settings["model"])
    check(sides, config, settings, arguments)
    if arguments.in_turns is None:
        automatic = arguments.micro_batch_size == "auto"  # then what fits is tried, not estimated
        settings["in_turns"] = 0 if automatic else rounds_that_fit(config, settings, len(sides), ranks)
    rounds = max(settings["in_turns"], 1)
    groups = [[side] for side in sides] if settings["in_turns"] else [sides]
    if arguments.micro_batch_size == "auto":
        settings["micro_batch_size"] = largest_micro_batch(groups, settings, threads)

    measured: dict[str, dict[str, Any]] = {side: {"seconds": [], "losses": [], "profile": {}} for side in sides}
    for number in range(rounds):
        steps = (arguments.steps + number) // rounds
        for group in groups:
            try:
                measure(group, settings, ranks, threads, steps, bool(arguments.profile), measured)
            except MemoryError:
                where = f"--micro-batch-size {settings['micro_batch_size']}"
                raise UserError(where, "the GPU's memory does not suffice", "lower it, or give --in-turns 1") from None

    found = result(measured, settings, ranks)
    found["profile_milliseconds"] = {side: measured[side]["profile"] for side in sides if measured[side]["profile"]}
    print(text(found), end="", flush=True)
    write(arguments.json, json.dumps(found, indent=1) + "\n")
    if arguments.profile:
        write(arguments.profile, markdown(found["profile_milliseconds"]))


def measure(
    sides: Sequence[str],
    settings: Mapping[str, Any],
    ranks: int,
    threads: int,
    steps: int,
    profiled: bool,
    measured: Mapping[str, dict[str, Any]],
) -> None:
    """Build these sides, warm them up, and let them step in turn; what is found is added to `measured`."""
    size = settings["micro_batch_size"]
    with ExitStack() as stack:
        running: dict[str, Ranks] = {}
        for side in sides:  # built one after the other: only one side computes at a time
            running[side] = stack.enter_context(started(side, settings, ranks, threads))
            measured[side].update(answers_of(running[side])[0])
        for count, kept in ((settings["warmup"], False), (steps, True)):
            for _ in range(count):
                for side, processes in running.items():
                    answers = ask(processes, do="step", steps=1, micro_batch_size=size)
                    if kept:
                        measured[side]["seconds"].append(max(answer["seconds"] for answer in answers))
                        measured[side]["losses"].append(sum(answer["loss"] for answer in answers) / ranks)
        for side, processes in running.items():
            peaks = [answer["peak_memory_gib"] for answer in ask(processes, do="peak")]
            earlier = measured[side].get("peak_memory_gib", peaks)
            measured[side]["peak_memory_gib"] = [max(pair) for pair in zip(peaks, earlier, strict=True)]
        for side, processes in running.items() if profiled else ():
            [shares, *_] = ask(processes, do="profile", steps=_PROFILED_STEPS, micro_batch_size=size)
            measured[side]["profile"] = shares["milliseconds"]


def largest_micro_batch(groups: Sequence[Sequence[str]], settings: Mapping[str, Any], threads: int) -> int:
    """The largest power of two sequences that all sides of a group take, in memory together; for one rank."""
    fits = _LARGEST_MICRO_BATCH
    for group in groups:
        reached = 0
        with ExitStack() as stack:
            try:
                running = [stack.enter_context(started(side, settings, 1, threads)) for side in group]
                for processes in running:
                    answers_of(processes)
                while 2 * reached <= fits and reached < fits:
                    size = max(1, 2 * reached)
                    for _ in range(2):  # the optimizer's state is made in the first step
                        for processes in running:
                            ask(processes, do="step", steps=1, micro_batch_size=size)
                    reached = size
            except MemoryError:
                pass
        if reached == 0:
            raise UserError(
                "--micro-batch-size auto", f"not even one sequence fits for {', '.join(group)}", "shorten the sequences"
            )
        fits = min(fits, reached)
    return fits


def check(sides: Sequence[str], config: HyperMoEConfig, settings: Mapping[str, Any], given: argparse.Namespace) -> None:
    """Refuse what cannot be run before anything is started."""
    for side in sides:
        if side not in SIDES:
            raise UserError(f"--sides {side}", "no such side", closest(side, SIDES))
    if len(set(sides)) < len(sides):
        raise UserError(f"--sides {','.join(sides)}", "a side is named twice", "name each once")
    check_arguments(given, _AT_LEAST, given.json, given.profile)
    rounds = given.in_turns if given.in_turns is not None else _ROUNDS
    if given.steps < rounds:
        raise UserError(f"--steps {given.steps}", f"fewer than --in-turns {rounds}", "give more steps")
    if given.activation_checkpointing and not set(sides) <= set(_RECOMPUTE):
        raise UserError("--activation-checkpointing", f"only of {', '.join(_RECOMPUTE)}", "leave the others out")
    check_expert_parallel(settings["expert_parallel"], config.num_experts, given.ranks)
    gpus = torch.cuda.device_count()
    if gpus and given.ranks > gpus:
        raise UserError(f"--ranks {given.ranks}", f"this machine has {gpus} GPUs", f"give at most {gpus}")
    if given.micro_batch_size == "auto" and (not gpus or given.ranks > 1):
        raise UserError("--micro-batch-size auto", "is found on one GPU rank alone", "give a number of sequences")


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """What the ranks are told, as plain data."""
    automatic = given.micro_batch_size == "auto"
    size = 1 if automatic else given.micro_batch_size
    return {
        "preset": given.preset,
        "overrides": given.overrides,
        "model": model_fields(given.preset, given.overrides),
        "micro_batch_size": size,
        "largest_micro_batch_size": _LARGEST_MICRO_BATCH if automatic else size,
        **{name: getattr(given, name) for name in ("precision", "sequence_length", "expert_parallel", "seed")},
        **{name: getattr(given, name) for name in ("steps", "warmup", "threads", "repeat_batch", "in_turns")},
        **{name: getattr(given, name) for name in ("accumulation", "activation_checkpointing")},
    }


def model_fields(preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The preset's fields with the overrides over them, all known and of the right type."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}", "no such preset", closest(preset, PRESETS))
    fields = apply_overrides({**PRESETS[preset]}, overrides)
    for key, value in fields.items():
        if key not in HyperMoEConfig.__annotations__:
            raise UserError(key, "no such field of the model", closest(key, HyperMoEConfig.__annotations__))
        default = getattr(HyperMoEConfig, key)
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise UserError(f"{key}={value!r}", "has the wrong type", f"give one like {default!r}")
    try:
        return {"vocab_size": HyperMoEConfig(**fields).vocab_size, **fields}
    except ConfigurationError as error:
        raise UserError(error.where, error.problem, error.remedy) from None


def rounds_that_fit(config: HyperMoEConfig, settings: Mapping[str, Any], sides: int, ranks: int) -> int:
    """0 where all sides fit into memory together, else 2 rounds of one side at a time, told in a line.

    A bound from what was seen of the engine under ZeRO 1: a parameter takes 28 bytes in fp32 and 22 in bf16 (weights,
    gradients twice, fp32 gradients, master weights and moments), and activations 16 D and 4 K F numbers a layer and
    three times the logits, in the precision of the weights.
    """
    width = 16 * config.hidden_size + 4 * config.num_experts_per_tok * config.moe_intermediate_size
    numbers = config.num_hidden_layers * width + 3 * config.vocab_size
    bytes_of_number, bytes_of_parameter = (4, 28) if settings["precision"] == "fp32" else (2, 22)
    activations = bytes_of_number * numbers * settings["micro_batch_size"] * settings["sequence_length"]
    state = bytes_of_parameter * config.parameter_counts().total
    needed, free = sides * (state + ranks * activations), psutil.virtual_memory().available
    if torch.cuda.is_available():
        free = ranks * torch.cuda.mem_get_info()[0]
    if needed <= free:
        return 0
    print(
        f"note: {sides} sides need about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free",
        f"{f'; one at a time, {_ROUNDS} rounds (--in-turns 0: all at once)' if sides > 1 else ''}",
        sep="",
        file=sys.stderr,
    )
    return _ROUNDS if sides > 1 else 0


def write(path: Path | None, content: str) -> None:
    """Write a result where one is asked for."""
    if path is not None:
        path.write_text(content, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--preset", default="gpt2-small-8e", help=f"one of {', '.join(PRESETS)} (default: gpt2-small-8e)")
    add("--sides", default="hypermoe,moe", help=f"of {','.join(SIDES)} (default: hypermoe,moe)")
    add(
        "--ranks",
        type=int,
        default=1 if on_gpu else 2,
        help="processes of each side, a GPU each (default: 1 on GPU, else 2)",
    )
    add("--expert-parallel", type=int, help="ranks that share one copy of the experts (default: all)")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="bf16" if on_gpu else "fp32",
        help="default: bf16 on GPU, else fp32",
    )
    add("--micro-batch-size", type=sequences, default=2, help="sequences a rank; auto: most that fit (default: 2)")
    add("--accumulation", type=int, default=1, metavar="N", help="micro-batches of a step, all the same (default: 1)")
    add("--activation-checkpointing", action="store_true", help=f"recompute layers; of {', '.join(_RECOMPUTE)}")
    add("--sequence-length", type=int, default=512, help="tokens of a sequence (default: 512)")
    add("--steps", type=int, default=6, help="measured steps of each side (default: 6)")
    add("--warmup", type=int, default=2, help="steps before them (default: 2)")
    add("--threads", type=int, help="CPU threads of a rank (default: its share of the cores)")
    add("--seed", type=int, default=1234, help="of weights and token ids (default: 1234)")
    add("--repeat-batch", action="store_true", help="the same token ids in every step, so that the loss falls")
    turns = "keep one side in memory at a time: a share of its steps, then the next side's, so many times; 0 keeps all "
    turns += f"in memory and alternates step by step (default: 0 where they look like fitting, else {_ROUNDS})"
    add("--in-turns", type=int, metavar="ROUNDS", help=turns)
    add("--json", type=Path, metavar="FILE", help="write everything: seconds, GiB, nats per token")
    add("--profile", type=Path, metavar="FILE.md", help=f"profile {_PROFILED_STEPS} more steps, in ms a step")
    add("overrides", nargs="*", metavar="key=value", help="a field of the model")
    arguments = parser.parse_intermixed_args()
    arguments.expert_parallel = arguments.expert_parallel if arguments.expert_parallel is not None else arguments.ranks
    if arguments.threads is None:
        arguments.threads = max(1, (os.cpu_count() or 1) // max(arguments.ranks, 1))
    return arguments


def sequences(value: str) -> int | str:
    """A number of sequences, or auto."""
    return value if value == "auto" else int(value)


if __name__ == "__main__":
    with one_line_errors():
        main()
