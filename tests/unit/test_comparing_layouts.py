"""The comparison of runs on different layouts accepts ties and rejects all other differences."""

from pathlib import Path

import pytest
import torch

from tests.helpers import routing
from tests.helpers.routing import LayerRouting, StepRouting, Tie, assert_same_until_a_tie, first_tie

T, N, K, STEPS = 12, 6, 2, 4


def steps(tie_in: int | None = None) -> list[StepRouting]:
    """Return random routing for two layers. In layer 1 of step `tie_in`, experts 1 and 2 of token 3 nearly tie."""
    generator = torch.Generator().manual_seed(0)
    routings = []
    for step in range(STEPS):
        layers = []
        for layer in range(2):
            logits_TN = torch.randn(T, N, generator=generator)
            if (step, layer) == (tie_in, 1):
                logits_TN[3] = torch.tensor([2.0, 1.0, 1.0 - 1e-6, 0.0, 0.0, 0.0])
            layers.append(LayerRouting(logits_TN, logits_TN.topk(K).indices))
        routings.append(layers)
    return routings


def with_selection(routings: list[StepRouting], step: int, token: int, experts: list[int]) -> list[StepRouting]:
    routings[step][1].selected_TK[token] = torch.tensor(experts)
    return routings


# Loss and one other metric for each step.
METRICS = [[5.0, 1.0], [4.0, 1.0], [3.0, 1.0], [2.0, 1.0]]
METRICS_AFTER_TIE = [[5.0, 1.0], [4.0, 1.0], [3.001, 2.0], [2.001, 2.0]]


def test_equal_runs_are_compared_in_every_step_whatever_the_order_of_selected_experts() -> None:
    ours, theirs = steps(2), steps(2)
    ours[0][0] = ours[0][0]._replace(selected_TK=ours[0][0].selected_TK.flip(1))
    assert first_tie(ours, theirs) is None
    assert assert_same_until_a_tie(METRICS, METRICS, (ours, theirs), 1e-5) is None
    with pytest.raises(AssertionError, match=r"step index 2: 3.001 and 3.0; None"):
        assert_same_until_a_tie(METRICS_AFTER_TIE, METRICS, (ours, theirs), 1e-5)


def test_after_a_tie_losses_may_differ_by_one_percent_and_other_metrics_freely() -> None:
    ours, theirs = with_selection(steps(2), 2, 3, [0, 2]), steps(2)
    tie = Tie(2, 1, [3])
    with pytest.warns(UserWarning, match="compared up to a tie"):
        assert assert_same_until_a_tie(METRICS_AFTER_TIE, METRICS, (ours, theirs), 1e-5) == tie
    for worse in (
        [[5.0, 1.0], [4.1, 1.0], *METRICS_AFTER_TIE[2:]],
        [[5.0, 1.1], *METRICS_AFTER_TIE[1:]],
        [*METRICS_AFTER_TIE[:3], [2.03, 1.0]],
    ):
        with pytest.raises(AssertionError, match="step index"):
            assert_same_until_a_tie(worse, METRICS, (ours, theirs), 1e-5)


def test_a_different_selection_without_a_tie_fails() -> None:
    with pytest.raises(
        AssertionError, match=r"step=2, layer=1, tokens=\[4\].*experts differ by .*, so they do not tie"
    ):
        first_tie(with_selection(steps(), 2, 4, [0, 1] if 0 not in steps()[2][1].selected_TK[4] else [4, 5]), steps())


def test_a_tie_with_different_router_logits_fails() -> None:
    ours, theirs = with_selection(steps(2), 2, 3, [0, 2]), steps(2)
    ours[2][1].logits_TN[7] += 1e-3
    with pytest.raises(AssertionError, match="more than rounding errors explain"):
        first_tie(ours, theirs)


def test_the_routing_of_all_ranks_is_read_in_sample_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [expected], ranks, accumulation = steps()[:1], 2, 3
    blocks = [[part.split(T // ranks // accumulation) for part in layer] for layer in expected]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        own = [
            [LayerRouting(*(part[number * ranks + rank] for part in layer)) for layer in blocks]
            for number in range(accumulation)
        ]
        routing.write_routing(tmp_path, 1, own)
    [read] = routing.read_routing(tmp_path, 1)
    for one, other in zip(read, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
