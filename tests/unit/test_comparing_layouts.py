"""How the tests compare runs on different layouts: a tie cannot break it, and a fault cannot pass as one."""

from pathlib import Path

import pytest
import torch

from tests.helpers import routing
from tests.helpers.routing import LayerRouting, StepRouting, Tie, assert_same_until_a_tie, first_tie

T, N, K, STEPS = 12, 6, 2, 4


def steps(tie_in: int | None = None) -> list[StepRouting]:
    """Two layers; in the second one of a step the third token's second and third best expert are nearly as good."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for step in range(STEPS):
        layers = []
        for layer in range(2):
            logits_TN = torch.randn(T, N, generator=generator)
            if (step, layer) == (tie_in, 1):
                logits_TN[3] = torch.tensor([2.0, 1.0, 1.0 - 1e-6, 0.0, 0.0, 0.0])
            layers.append(LayerRouting(logits_TN, logits_TN.topk(K).indices))
        made.append(layers)
    return made


def flipped(made: list[StepRouting], step: int, token: int, to: list[int]) -> list[StepRouting]:
    layer = made[step][1]
    layer.selected_TK[token] = torch.tensor(to)
    return made


LOSSES = [[5.0, 1.0], [4.0, 1.0], [3.0, 1.0], [2.0, 1.0]]
PARTED = [[5.0, 1.0], [4.0, 1.0], [3.001, 2.0], [2.001, 2.0]]


def test_equal_runs_are_compared_to_their_end_whatever_the_order_of_the_experts() -> None:
    ours, theirs = steps(2), steps(2)
    ours[0][0] = ours[0][0]._replace(selected_TK=ours[0][0].selected_TK.flip(1))
    assert first_tie(ours, theirs) is None
    assert assert_same_until_a_tie(LOSSES, LOSSES, (ours, theirs), 1e-5) is None
    with pytest.raises(AssertionError, match=r"step index 2: 3.001 and 3.0; None"):
        assert_same_until_a_tie(PARTED, LOSSES, (ours, theirs), 1e-5)


def test_numbers_from_a_tie_on_may_differ_and_losses_not_by_much() -> None:
    ours, theirs = flipped(steps(2), 2, 3, [0, 2]), steps(2)
    tie = Tie(2, 1, [3])
    with pytest.warns(UserWarning, match="compared up to a tie"):
        assert assert_same_until_a_tie(PARTED, LOSSES, (ours, theirs), 1e-5) == tie
    for worse in ([[5.0, 1.0], [4.1, 1.0], *PARTED[2:]], [[5.0, 1.1], *PARTED[1:]], [*PARTED[:3], [2.03, 1.0]]):
        with pytest.raises(AssertionError, match="step index"):
            assert_same_until_a_tie(worse, LOSSES, (ours, theirs), 1e-5)


def test_another_selection_that_is_no_tie_is_a_fault() -> None:
    with pytest.raises(AssertionError, match=r"step=2, layer=1, tokens=\[4\].*apart: no tie"):
        first_tie(flipped(steps(), 2, 4, [0, 1] if 0 not in steps()[2][1].selected_TK[4] else [4, 5]), steps())


def test_a_tie_among_logits_that_differ_is_a_fault() -> None:
    ours, theirs = flipped(steps(2), 2, 3, [0, 2]), steps(2)
    ours[2][1].logits_TN[7] += 1e-3
    with pytest.raises(AssertionError, match="no tie, another model"):
        first_tie(ours, theirs)


def test_what_ranks_write_is_read_in_the_order_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [whole], ranks, accumulation = steps()[:1], 2, 3
    blocks = [[part.split(T // ranks // accumulation) for part in layer] for layer in whole]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        own = [
            [LayerRouting(*(part[number * ranks + rank] for part in layer)) for layer in blocks]
            for number in range(accumulation)
        ]
        routing.write_routing(tmp_path, 1, own)
    [read] = routing.read_routing(tmp_path, 1)
    for one, other in zip(read, whole, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
