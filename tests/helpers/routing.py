"""Compare two runs of one model on different layouts, up to the first tie of a top-K router.

Different layouts sum in different orders, so results differ by rounding. If two experts of a token are almost tied for
the last of its K selections, rounding may swap them, and from then on the two runs compute different functions. Metrics
are therefore compared up to the first step in which a token selects a different expert. The helper also checks that
this was a tie: all earlier selections are equal, so the router logits of that layer must still agree for every token.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-4  # largest absolute rounding error of router logits in fp32
AFTER_A_TIE = (
    1e-2  # largest relative difference of losses after a tie; both runs are correct but compute different functions
)


class LayerRouting(NamedTuple):
    """Router logits [T, N] and selected experts [T, K] of the tokens of a step."""

    logits_TN: Tensor
    selected_TK: Tensor


StepRouting = list[LayerRouting]  # one per MoE layer; tokens are in the order of the step's samples


@dataclass(frozen=True)
class Tie:
    """The first difference between the selections of two runs.

    Attributes:
        step: index of the first step in which a token selected a different expert.
        layer: first MoE layer of that step with such a token.
        tokens: indices of those tokens in the step.
    """

    step: int
    layer: int
    tokens: list[int]


def routing_of(output: Any) -> StepRouting:
    """Return the routing of a forward pass with `output_router_logits`."""
    pairs = zip(output.router_logits, output.selected_experts, strict=True)
    return [LayerRouting(logits.detach().float().clone(), selected.clone()) for logits, selected in pairs]


def joined(parts: Sequence[StepRouting]) -> StepRouting:
    """Concatenate the routing of the parts of a step, which are in the order of its samples."""
    return [
        LayerRouting(torch.cat([part.logits_TN for part in layer]), torch.cat([part.selected_TK for part in layer]))
        for layer in zip(*parts, strict=True)
    ]


def of_all_ranks(micro_batches: list[StepRouting]) -> StepRouting:
    """Gather the routing of a step from the micro-batches of all ranks, in the order of its samples (collective)."""
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, micro_batches)
    return joined([part for block in zip(*ranks, strict=True) for part in block])


def first_tie(ours: Sequence[StepRouting], theirs: Sequence[StepRouting]) -> Tie | None:
    """Return the first difference between the selections of two runs; None if there is no difference.

    Raises:
        AssertionError: the difference is not a tie.
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
    """Assert that the logits agree on all tokens, and that the tokens of `tie` had two nearly equal experts."""
    difference = (one.logits_TN - other.logits_TN).abs().max().item()
    assert difference <= ROUNDING, f"{tie}: the router logits differ by {difference:.1e}: not a tie, another model"
    K = one.selected_TK.shape[1]
    best_TN = one.logits_TN[tie.tokens].sort(-1, descending=True).values
    gap = (best_TN[:, K - 1] - best_TN[:, K]).max().item()
    assert gap <= 2 * ROUNDING, f"{tie}: the logits of the experts differ by {gap:.1e}: not a tie"


def assert_same_until_a_tie(
    found: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]],
    routing: tuple[Sequence[StepRouting], Sequence[StepRouting]],
    relative: float,
) -> Tie | None:
    """Compare the metrics of each step; the first metric is the loss.

    Before a tie, all metrics must agree within `relative`. From the tie on, only losses are compared, with tolerance
    `AFTER_A_TIE`.

    Returns:
        The tie, after a warning; None if there was none and every step was compared within `relative`.
    """
    tie = first_tie(*routing)
    steps_before_tie = len(found) if tie is None else tie.step
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        compared = zip(ours, theirs, strict=True) if step < steps_before_tie else [(ours[0], theirs[0])]
        for one, other in compared:
            limit = relative if step < steps_before_tie else AFTER_A_TIE
            assert abs(one - other) <= limit * abs(other), f"step index {step}: {one} and {other}; {tie}"
    if tie is not None:
        warnings.warn(f"compared up to a tie: {tie}", stacklevel=2)
    return tie


def write_routing(run: Path, step: int, micro_batches: list[StepRouting]) -> None:
    """Write this rank's routing of a step to the run folder, replacing that of an earlier launch."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    (run / "routing").mkdir(exist_ok=True)
    content = [[tuple(layer) for layer in part] for part in micro_batches]
    torch.save((ranks, content), run / "routing" / f"{step}_{rank}")


def read_routing(run: Path, steps: int) -> list[StepRouting]:
    """Read the routing of a run's first steps from the files of its ranks."""
    steps_routing = []
    for step in range(1, steps + 1):
        ranks, _ = torch.load(run / "routing" / f"{step}_0")
        parts = [torch.load(run / "routing" / f"{step}_{rank}")[1] for rank in range(ranks)]
        blocks = [part for block in zip(*parts, strict=True) for part in block]
        steps_routing.append(joined([[LayerRouting(*layer) for layer in part] for part in blocks]))
    return steps_routing
