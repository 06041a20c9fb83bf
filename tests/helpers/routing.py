"""Compare two runs of one model on different layouts, as far as a top-K router lets them be compared.

Another layout adds the same numbers in another order. A token whose K-th and next expert are as good as equal may then
go to the other one, from which on the two runs see different functions. So numbers are compared up to the first step
in which a token chose another expert, and that this was a tie is checked: nothing before that layer of that step has
chosen differently, so its router logits still agree on every token.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-4  # of router logits, absolute, in fp32
AFTER_A_TIE = 1e-2  # relative difference of losses: the runs are different from there on, not broken


class LayerRouting(NamedTuple):
    """What a router chose for the tokens of a step: logits [T, N] and experts [T, K]."""

    logits_TN: Tensor
    selected_TK: Tensor


StepRouting = list[LayerRouting]  # by MoE layer, for all tokens of the step in the order of its samples


@dataclass(frozen=True)
class Tie:
    """Where two runs part.

    Attributes:
        step: index of the first step in which a token chose another expert.
        layer: first MoE layer of it in which one did.
        tokens: which ones did, by their place in the step.
    """

    step: int
    layer: int
    tokens: list[int]


def routing_of(output: Any) -> StepRouting:
    """The routing of one forward pass made with `output_router_logits`."""
    pairs = zip(output.router_logits, output.selected_experts, strict=True)
    return [LayerRouting(logits.detach().float().clone(), selected.clone()) for logits, selected in pairs]


def joined(parts: Sequence[StepRouting]) -> StepRouting:
    """The routing of a step from that of its parts, in the order of its samples."""
    return [
        LayerRouting(torch.cat([part.logits_TN for part in layer]), torch.cat([part.selected_TK for part in layer]))
        for layer in zip(*parts, strict=True)
    ]


def of_all_ranks(micro_batches: list[StepRouting]) -> StepRouting:
    """The routing of a step from this rank's micro-batches (collective): a micro-batch of all ranks is one block."""
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, micro_batches)
    return joined([part for block in zip(*ranks, strict=True) for part in block])


def first_tie(ours: Sequence[StepRouting], theirs: Sequence[StepRouting]) -> Tie | None:
    """Where two runs part, None if they never do.

    Raises:
        AssertionError: they part otherwise than by ties.
    """
    for step, layers in enumerate(zip(ours, theirs, strict=True)):
        for layer, (one, other) in enumerate(zip(*layers, strict=True)):
            differs_T = (one.selected_TK.sort(-1).values != other.selected_TK.sort(-1).values).any(-1)
            if differs_T.any():
                tie = Tie(step, layer, differs_T.nonzero().flatten().tolist())
                _check(tie, one, other)
                return tie
    return None


def _check(tie: Tie, one: LayerRouting, other: LayerRouting) -> None:
    """The logits agree on all tokens, and those that chose otherwise had two experts as good as equal."""
    apart = (one.logits_TN - other.logits_TN).abs().max().item()
    assert apart <= ROUNDING, f"{tie}: the router's logits differ by {apart:.1e}: no tie, another model"
    K = one.selected_TK.shape[1]
    best_TN = one.logits_TN[tie.tokens].sort(-1, descending=True).values
    gap = (best_TN[:, K - 1] - best_TN[:, K]).max().item()
    assert gap <= 2 * ROUNDING, f"{tie}: the experts are {gap:.1e} apart: no tie"


def assert_same_until_a_tie(
    found: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]],
    routing: tuple[Sequence[StepRouting], Sequence[StepRouting]],
    relative: float,
) -> Tie | None:
    """Compare the numbers of each step, the loss first: up to a tie within `relative`, from then on the losses loosely.

    Returns:
        The tie, which is also warned of; None if there is none and all was compared.
    """
    tie = first_tie(*routing)
    parted = len(found) if tie is None else tie.step
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        compared = zip(ours, theirs, strict=True) if step < parted else [(ours[0], theirs[0])]
        for one, other in compared:
            limit = relative if step < parted else AFTER_A_TIE
            assert abs(one - other) <= limit * abs(other), f"step index {step}: {one} and {other}; {tie}"
    if tie is not None:
        warnings.warn(f"compared up to a tie: {tie}", stacklevel=2)
    return tie


def write_routing(run: Path, step: int, micro_batches: list[StepRouting]) -> None:
    """Keep this rank's routing of a step in the run folder; a later launch replaces it."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    (run / "routing").mkdir(exist_ok=True)
    content = [[tuple(layer) for layer in part] for part in micro_batches]
    torch.save((ranks, content), run / "routing" / f"{step}_{rank}")


def read_routing(run: Path, steps: int) -> list[StepRouting]:
    """The routing of a run's first steps, from what its ranks wrote."""
    found = []
    for step in range(1, steps + 1):
        ranks, _ = torch.load(run / "routing" / f"{step}_0")
        parts = [torch.load(run / "routing" / f"{step}_{rank}")[1] for rank in range(ranks)]
        blocks = [part for block in zip(*parts, strict=True) for part in block]
        found.append(joined([[LayerRouting(*layer) for layer in part] for part in blocks]))
    return found
