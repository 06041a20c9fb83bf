"""Compare two runs of the same model on different parallel layouts, up to the first tie in a top-K router.

Each layout sums numbers in a different order, so results differ by rounding errors. If two experts nearly tie for the
last of a token's K selections, rounding decides which one is selected, and from then on the two runs compute different
functions. All metrics are therefore compared only up to the first step in which a token selects different experts. The
comparison also checks that this difference is a tie: because all earlier selections are equal, the router logits of
that layer must still agree for every token.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-4  # largest absolute rounding error of router logits in fp32
# Largest relative difference between losses after a tie. Both runs are correct but compute different functions.
TOLERANCE_AFTER_TIE = 1e-2


class LayerRouting(NamedTuple):
    """Router logits [T, N] and selected experts [T, K] of one layer for all tokens of a step."""

    logits_TN: Tensor
    selected_TK: Tensor


StepRouting = list[LayerRouting]  # one item per MoE layer, with the tokens in sample order


@dataclass(frozen=True)
class Tie:
    """The first difference between the experts selected in two runs.

    Attributes:
        step: index of the first step in which a token selected different experts.
        layer: index of the first MoE layer of that step with different selections.
        tokens: indices of the tokens with different selections in that layer.
    """

    step: int
    layer: int
    tokens: list[int]


def routing_of(output: Any) -> StepRouting:
    """Return the routing from a model output that includes the router logits."""
    pairs = zip(output.router_logits, output.selected_experts, strict=True)
    return [LayerRouting(logits.detach().float().clone(), selected.clone()) for logits, selected in pairs]


def concatenate(parts: Sequence[StepRouting]) -> StepRouting:
    """Concatenate the routing of consecutive micro-batches of a step."""
    return [
        LayerRouting(torch.cat([part.logits_TN for part in layer]), torch.cat([part.selected_TK for part in layer]))
        for layer in zip(*parts, strict=True)
    ]


def gather_routing(micro_batches: list[StepRouting]) -> StepRouting:
    """Gather the routing of a step from all ranks, in sample order (collective)."""
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, micro_batches)
    return concatenate([part for block in zip(*ranks, strict=True) for part in block])


def first_tie(ours: Sequence[StepRouting], theirs: Sequence[StepRouting]) -> Tie | None:
    """Return the first tie at which two runs selected different experts, or None if all selections are equal.

    Raises:
        AssertionError: the selected experts differ although the router logits do not tie.
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
    """Assert that the router logits agree for all tokens, and that two experts nearly tie for each token of `tie`."""
    difference = (one.logits_TN - other.logits_TN).abs().max().item()
    assert difference <= ROUNDING, (
        f"{tie}: the router logits differ by {difference:.1e}, more than rounding errors explain"
    )
    K = one.selected_TK.shape[1]
    best_TN = one.logits_TN[tie.tokens].sort(-1, descending=True).values
    gap = (best_TN[:, K - 1] - best_TN[:, K]).max().item()
    assert gap <= 2 * ROUNDING, f"{tie}: the logits of the experts differ by {gap:.1e}, so they do not tie"


def assert_same_until_a_tie(
    found: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]],
    routing: tuple[Sequence[StepRouting], Sequence[StepRouting]],
    relative: float,
) -> Tie | None:
    """Assert that two runs have equal metrics in every step until their routers tie.

    Before a tie, all metrics must agree within the tolerance `relative`. From the tie on, only the losses are compared,
    with the tolerance `TOLERANCE_AFTER_TIE`. The loss is the first metric of each step.

    Returns:
        The tie, which is also reported as a warning; None if the metrics agree within `relative` in every step.
    """
    tie = first_tie(*routing)
    steps_before_tie = len(found) if tie is None else tie.step
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        compared = zip(ours, theirs, strict=True) if step < steps_before_tie else [(ours[0], theirs[0])]
        for one, other in compared:
            limit = relative if step < steps_before_tie else TOLERANCE_AFTER_TIE
            assert abs(one - other) <= limit * abs(other), f"step index {step}: {one} and {other}; {tie}"
    if tie is not None:
        warnings.warn(f"compared up to a tie: {tie}", stacklevel=2)
    return tie


def write_routing(run: Path, step: int, micro_batches: list[StepRouting]) -> None:
    """Write this rank's routing of a step to the run folder, replacing any file from an earlier launch."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    (run / "routing").mkdir(exist_ok=True)
    content = [[tuple(layer) for layer in part] for part in micro_batches]
    torch.save((ranks, content), run / "routing" / f"{step}_{rank}")


def read_routing(run: Path, steps: int) -> list[StepRouting]:
    """Read the routing of a run's first `steps` steps from the files of all ranks."""
    steps_routing = []
    for step in range(1, steps + 1):
        ranks, _ = torch.load(run / "routing" / f"{step}_0")
        parts = [torch.load(run / "routing" / f"{step}_{rank}")[1] for rank in range(ranks)]
        blocks = [part for block in zip(*parts, strict=True) for part in block]
        steps_routing.append(concatenate([[LayerRouting(*layer) for layer in part] for part in blocks]))
    return steps_routing
