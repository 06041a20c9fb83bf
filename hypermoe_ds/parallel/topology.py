"""Compute how ranks share batches and experts, without a GPU, a process group or DeepSpeed."""

from collections.abc import Sequence
from itertools import accumulate

from pydantic import Field

from hypermoe_ds.config import LARGEST_COUNT, Settings
from hypermoe_ds.errors import UserError


class ParallelConfig(Settings):
    """Settings of the section `parallel`."""

    expert: int = Field(
        1, ge=1, le=LARGEST_COUNT, description="expert-parallel size: ranks that share one copy of the experts"
    )
    overlap_hyper_experts: bool = Field(
        True,
        description="on GPUs, run HyperExperts on a separate CUDA stream, overlapped with the all-to-all, if they were "
        "generated before routing",
    )


def gradient_accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the number of micro-batches that each rank runs for one optimizer step.

    Args:
        global_batch_size: number of sequences per optimizer step, over all ranks.
        micro_batch_size: number of sequences per forward pass on one rank.
        world_size: number of ranks. All ranks are data-parallel, with or without expert parallelism.

    Raises:
        UserError: `global_batch_size` is not a multiple of `micro_batch_size * world_size`.
    """
    at_once = micro_batch_size * world_size
    if global_batch_size % at_once:
        share = global_batch_size // world_size
        fitting = [str(size) for size in range(1, share + 1) if share % size == 0]
        remedy = f"choose a global batch that is a multiple of {at_once}"
        if global_batch_size % world_size == 0:
            remedy = f"with {world_size} ranks, choose one of {', '.join(fitting)}"
        raise UserError(
            f"train.micro_batch_size={micro_batch_size}",
            f"multiplied by {world_size} ranks, it does not divide train.global_batch_size={global_batch_size}",
            remedy,
        )
    return global_batch_size // at_once


def check_expert_parallel(expert: int, num_experts: int, world_size: int) -> None:
    """Check that the experts can be sharded over the ranks.

    Args:
        expert: number of ranks that share one copy of the experts.
        num_experts: number N of experts per layer.
        world_size: number of ranks.

    Raises:
        UserError: `expert` does not divide `num_experts` or `world_size`.
    """
    where = f"parallel.expert={expert}"
    both = [n for n in range(1, min(num_experts, world_size) + 1) if num_experts % n == 0 and world_size % n == 0]
    remedy = f"choose {' or '.join(map(str, both))}"
    if num_experts % expert:
        raise UserError(where, f"does not divide model.num_experts={num_experts}", remedy)
    if world_size % expert:
        raise UserError(where, f"does not divide the number of ranks, {world_size}", remedy)


def hosts_that_fit(slots: Sequence[int], global_batch_size: int, micro_batch_size: int) -> int:
    """Return the largest n for which the ranks of the first n hosts can split the batch evenly; 0 if there is none.

    Args:
        slots: number of ranks on each host, in the order in which the hosts are used.
        global_batch_size: number of sequences per optimizer step, over all ranks.
        micro_batch_size: number of sequences per forward pass on one rank.
    """
    fitting = [global_batch_size % (micro_batch_size * ranks) == 0 for ranks in accumulate(slots)]
    return max((number for number, fits in enumerate(fitting, start=1) if fits), default=0)


def check_widths_on_gpu(hidden_size: int, expert_width: int, precision: str) -> None:
    """Check that a GPU can multiply matrices of the experts' sizes.

    The grouped matrix products of the experts need rows that are aligned to 16 bytes, that is, 8 values in bf16 or
    fp16, and 4 in fp32.

    Args:
        hidden_size: `model.hidden_size`.
        expert_width: `model.moe_intermediate_size`.
        precision: `train.precision`.

    Raises:
        UserError: a size is not a multiple of this number of values; the message names the nearest multiples.
    """
    multiple = 4 if precision == "fp32" else 8
    for key, width in (("hidden_size", hidden_size), ("moe_intermediate_size", expert_width)):
        if width % multiple:
            below = width - width % multiple
            nearest = " or ".join(str(size) for size in (below, below + multiple) if size)
            problem = f"is not a multiple of {multiple}, as the experts need on a GPU in {precision}"
            raise UserError(f"model.{key}={width}", problem, f"set it to {nearest}")


def largest_expert_parallel(expert: int, num_experts: int, world_size: int) -> int:
    """Return the largest number of ranks, up to `expert`, that can share one copy of the experts."""
    return max(n for n in range(1, expert + 1) if num_experts % n == 0 and world_size % n == 0)
