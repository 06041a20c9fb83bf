"""Compare the training steps of several models, called sides, on random token ids.

Each side runs in its own processes, and the sides alternate. The sides are hypermoe; moe (the same model without
HyperExperts); per_token (the published form, which generates a HyperExpert for each token); mixtral (Transformers'
Mixtral at the same shape in a plain torch loop); and deepspeed_moe (the same decoder with DeepSpeed's older, dropless
MoE layer). The baseline of the ratios is moe if it is measured, otherwise the last side. A key=value argument overrides
a field of the preset's model, such as num_hidden_layers=2.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from hypermoe_ds.config import apply_overrides, closest
from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import PRESETS, ConfigurationError, HyperMoEConfig
from hypermoe_ds.parallel.topology import check_expert_parallel
from hypermoe_ds.process import one_line_errors
from op_shares import markdown
from rank_processes import Rank, ask, read_answers, start_side
from results import Measurement, as_json, as_table, check_arguments, compare
from step_settings import StepSettings

SIDES = ("hypermoe", "moe", "mixtral", "deepspeed_moe", "per_token")
_MINIMUM = dict.fromkeys(("ranks", "expert_parallel", "sequence_length", "steps", "threads", "micro_batch_size"), 1)
_MINIMUM |= {"warmup": 0, "in_turns": 0, "accumulation": 1}
_CAN_RECOMPUTE = ("hypermoe", "moe", "per_token")
_PROFILED_STEPS, _LARGEST_MICRO_BATCH, _ROUNDS = 3, 64, 2


def main() -> None:
    """Check the arguments, measure and report."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # inherited by the ranks
    arguments = parse_arguments()
    settings = settings_of(arguments)
    sides = arguments.sides.split(",")
    check(sides, settings, arguments)
    # "auto" searches for the largest micro-batch that fits.
    if arguments.in_turns is None and arguments.micro_batch_size != "auto":
        settings = replace(settings, in_turns=rounds_that_fit(settings, len(sides)))
    groups = [[side] for side in sides] if settings.in_turns else [sides]
    if arguments.micro_batch_size == "auto":
        settings = replace(settings, micro_batch_size=largest_micro_batch(groups, settings))

    comparison = compare(measure_all(groups, settings, bool(arguments.profile)), settings)
    print(as_table(comparison), end="", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(comparison), indent=1) + "\n", encoding="utf-8")
    if arguments.profile:
        arguments.profile.write_text(markdown(comparison.profile_milliseconds), encoding="utf-8")


def measure_all(groups: Sequence[Sequence[str]], settings: StepSettings, profiled: bool) -> dict[str, Measurement]:
    """Measure all groups in each round. The sides of one group are in memory at the same time."""
    measured = {side: Measurement() for group in groups for side in group}
    rounds = max(settings.in_turns, 1)
    for number in range(rounds):
        steps = (settings.steps + number) // rounds
        for group in groups:
            try:
                measure({side: measured[side] for side in group}, settings, steps, profiled)
            except MemoryError:
                where = f"--micro-batch-size {settings.micro_batch_size}"
                raise UserError(where, "does not fit into the GPU's memory", "lower it, or give --in-turns 1") from None
    return measured


def measure(measured: Mapping[str, Measurement], settings: StepSettings, steps: int, profiled: bool) -> None:
    """Build the sides, run warm-up steps and measured steps alternately, and add the results to `measured`."""
    size = settings.micro_batch_size
    with ExitStack() as stack:
        running: dict[str, list[Rank]] = {}
        for side, result in measured.items():  # start the sides one after another, so that only one side computes
            running[side] = stack.enter_context(start_side(side, settings))
            built = read_answers(running[side])[0]
            result.parameters, result.device = built["parameters"], built["device"]
        for count, is_measured in ((settings.warmup, False), (steps, True)):
            for _ in range(count):
                for side, ranks in running.items():
                    answers = ask(ranks, do="step", steps=1, micro_batch_size=size)
                    if is_measured:
                        measured[side].seconds.append(max(answer["seconds"] for answer in answers))
                        measured[side].losses.append(sum(answer["loss"] for answer in answers) / len(ranks))
        for side, ranks in running.items():
            peaks = [answer["peak_memory_gib"] for answer in ask(ranks, do="peak")]
            earlier = measured[side].peak_memory_gib or peaks
            measured[side].peak_memory_gib = [max(pair) for pair in zip(peaks, earlier, strict=True)]
        for side, ranks in running.items() if profiled else ():
            rank0, *_ = ask(ranks, do="profile", steps=_PROFILED_STEPS, micro_batch_size=size)
            measured[side].profile = rank0["milliseconds"]


def largest_micro_batch(groups: Sequence[Sequence[str]], settings: StepSettings) -> int:
    """Return the largest power of two for `micro_batch_size` with which every group fits into the GPU's memory."""
    fits = _LARGEST_MICRO_BATCH
    for group in groups:
        reached = 0
        with ExitStack() as stack:
            try:
                running = [stack.enter_context(start_side(side, settings)) for side in group]
                for ranks in running:
                    read_answers(ranks)
                while 2 * reached <= fits and reached < fits:
                    size = max(1, 2 * reached)
                    for _ in range(2):  # the first step allocates the optimizer state
                        for ranks in running:
                            ask(ranks, do="step", steps=1, micro_batch_size=size)
                    reached = size
            except MemoryError:
                pass
        if reached == 0:
            raise UserError(
                "--micro-batch-size auto",
                f"not even one sequence fits into memory with {', '.join(group)}",
                "lower --sequence-length",
            )
        fits = min(fits, reached)
    return fits


def check(sides: Sequence[str], settings: StepSettings, arguments: argparse.Namespace) -> None:
    """Refuse invalid arguments before any process starts."""
    for side in sides:
        if side not in SIDES:
            raise UserError(f"--sides {side}", "no such side", closest(side, SIDES))
    if len(set(sides)) < len(sides):
        raise UserError(f"--sides {','.join(sides)}", "a side is given twice", "give each side once")
    check_arguments(arguments, _MINIMUM, arguments.json, arguments.profile)
    rounds = arguments.in_turns if arguments.in_turns is not None else _ROUNDS
    if settings.steps < rounds:
        raise UserError(f"--steps {settings.steps}", f"is less than --in-turns {rounds}", "give more steps")
    if settings.activation_checkpointing and not set(sides) <= set(_CAN_RECOMPUTE):
        raise UserError(
            "--activation-checkpointing", f"is only supported by {', '.join(_CAN_RECOMPUTE)}", "omit the other sides"
        )
    check_expert_parallel(settings.expert_parallel, HyperMoEConfig(**settings.model).num_experts, settings.ranks)
    gpus = torch.cuda.device_count()
    if gpus and settings.ranks > gpus:
        raise UserError(f"--ranks {settings.ranks}", f"this machine has {gpus} GPUs", f"give at most {gpus}")
    if arguments.micro_batch_size == "auto" and (not gpus or settings.ranks > 1):
        raise UserError("--micro-batch-size auto", "needs a GPU and --ranks 1", "give a number of sequences")


def settings_of(arguments: argparse.Namespace) -> StepSettings:
    """Return the settings that the arguments select."""
    automatic = arguments.micro_batch_size == "auto"
    size = 1 if automatic else arguments.micro_batch_size
    return StepSettings(
        preset=arguments.preset,
        overrides=arguments.overrides,
        model=model_fields(arguments.preset, arguments.overrides),
        micro_batch_size=size,
        largest_micro_batch_size=_LARGEST_MICRO_BATCH if automatic else size,
        precision=arguments.precision,
        sequence_length=arguments.sequence_length,
        expert_parallel=arguments.expert_parallel,
        seed=arguments.seed,
        steps=arguments.steps,
        warmup=arguments.warmup,
        threads=arguments.threads,
        repeat_batch=arguments.repeat_batch,
        in_turns=arguments.in_turns or 0,
        accumulation=arguments.accumulation,
        activation_checkpointing=arguments.activation_checkpointing,
        ranks=arguments.ranks,
    )


def model_fields(preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the preset's fields with the overrides applied. Refuse unknown fields and values of the wrong type."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}", "no such preset", closest(preset, PRESETS))
    fields = apply_overrides({**PRESETS[preset]}, overrides)
    for key, value in fields.items():
        if key not in HyperMoEConfig.__annotations__:
            raise UserError(key, "no such field of the model", closest(key, HyperMoEConfig.__annotations__))
        default = getattr(HyperMoEConfig, key)
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise UserError(f"{key}={value!r}", "has the wrong type", f"give a value like {default!r}")
    try:
        return {"vocab_size": HyperMoEConfig(**fields).vocab_size, **fields}
    except ConfigurationError as error:
        raise UserError(error.where, error.problem, error.remedy) from None


def rounds_that_fit(settings: StepSettings, sides: int) -> int:
    """Return 0 if all sides fit into memory together; otherwise print a note and return the default number of rounds.

    The estimate is based on the measured memory of the engine under ZeRO 1. A parameter takes 28 bytes in fp32 and 22
    bytes in bf16: weights, two copies of the gradients, fp32 gradients, master weights and moments. Activations take
    16 D + 4 K F values per layer and three times the logits, in the precision of the weights.
    """
    config = HyperMoEConfig(**settings.model)
    width = 16 * config.hidden_size + 4 * config.num_experts_per_tok * config.moe_intermediate_size
    numbers = config.num_hidden_layers * width + 3 * config.vocab_size
    bytes_per_number, bytes_per_parameter = (4, 28) if settings.precision == "fp32" else (2, 22)
    activations = bytes_per_number * numbers * settings.micro_batch_size * settings.sequence_length
    state = bytes_per_parameter * config.parameter_counts().total
    needed, free = sides * (state + settings.ranks * activations), psutil.virtual_memory().available
    if uses_gpu():
        free = settings.ranks * torch.cuda.mem_get_info()[0]
    if needed <= free:
        return 0
    note = f"note: {sides} sides need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    if sides > 1:
        note += f"; running one at a time, in {_ROUNDS} rounds (--in-turns 0: all at once)"
    print(note, file=sys.stderr)
    return _ROUNDS if sides > 1 else 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = uses_gpu()
    add = parser.add_argument
    add("--preset", default="gpt2-small-8e", help=f"one of {', '.join(PRESETS)} (default: gpt2-small-8e)")
    add("--sides", default="hypermoe,moe", help=f"sides to compare, from {','.join(SIDES)} (default: hypermoe,moe)")
    ranks = 1 if on_gpu else 2
    add("--ranks", type=int, default=ranks, help="processes of each side, one per GPU (default: 1 on GPU, else 2)")
    add("--expert-parallel", type=int, help="ranks that share one copy of the experts (default: all)")
    precision = "bf16" if on_gpu else "fp32"
    add("--precision", choices=("fp32", "bf16"), default=precision, help="default: bf16 on GPU, else fp32")
    size = "sequences per rank; auto: the largest number that fits (default: 2)"
    add("--micro-batch-size", type=sequences, default=2, metavar="N", help=size)
    add("--accumulation", type=int, default=1, metavar="N", help="micro-batches per step, with equal data (default: 1)")
    add("--activation-checkpointing", action="store_true", help=f"recompute layers (only {', '.join(_CAN_RECOMPUTE)})")
    add("--sequence-length", type=int, default=512, metavar="TOKENS", help="default: 512")
    add("--steps", type=int, default=6, help="measured steps of each side (default: 6)")
    add("--warmup", type=int, default=2, help="warm-up steps of each side (default: 2)")
    add("--threads", type=int, help="CPU threads per rank (default: its share of the cores)")
    add("--seed", type=int, default=1234, help="seed of weights and token ids (default: 1234)")
    add("--repeat-batch", action="store_true", help="use the same token ids in every step, so that the loss decreases")
    turns = "keep only one side in memory at a time, and run this number of rounds; 0 keeps all sides in memory and "
    turns += f"alternates after each step (default: 0 if the sides are likely to fit, else {_ROUNDS})"
    add("--in-turns", type=int, metavar="ROUNDS", help=turns)
    add("--json", type=Path, metavar="FILE", help="write all results: seconds, GiB, nats per token")
    add("--profile", type=Path, metavar="FILE.md", help=f"profile {_PROFILED_STEPS} more steps, in ms per step")
    add("overrides", nargs="*", metavar="key=value", help="fields of the preset's model")
    arguments = parser.parse_intermixed_args()
    arguments.expert_parallel = arguments.expert_parallel if arguments.expert_parallel is not None else arguments.ranks
    if arguments.threads is None:
        arguments.threads = max(1, (os.cpu_count() or 1) // max(arguments.ranks, 1))
    return arguments


def sequences(value: str) -> int | str:
    """Parse a number of sequences or "auto"."""
    return value if value == "auto" else int(value)


if __name__ == "__main__":
    with one_line_errors():
        main()
