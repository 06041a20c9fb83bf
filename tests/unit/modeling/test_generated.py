from typing import Any

import pytest
import torch
from model_references import distance, random_selection, wake
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypermoe_ds.modeling import generated, hyper_experts
from hypermoe_ds.modeling.generated import Assignment, HyperExpertWeights
from hypermoe_ds.modeling.hyper_experts import HyperExperts, HyperNetwork, SelectionEncoder, generate_ahead
from tests.helpers.synchronisations import Synchronisations

D, A = 24, 10


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "J"), [(1, 1), (4, 1), (1, 3), (2, 2), (5, 1)])
def test_the_few_rows_of_a_step_of_generation_get_what_many_get(tokens: int, J: int, gated: bool) -> None:
    weights = HyperExpertWeights(*(torch.randn(6, *shape) for shape in ((16, 8), (8,), (8, 16), (16,))))
    x, sets, gates = torch.randn(9, 16), torch.randint(0, 6, (9, J)), torch.rand(9, J)
    everything = generated.apply_generated(x.requires_grad_(), Assignment(sets, gates if gated else None), weights)
    with torch.no_grad():
        assignment = Assignment(sets[:tokens], gates[:tokens] if gated else None)
        assert distance(generated.apply_generated(x[:tokens], assignment, weights), everything[:tokens]) < 1e-6


@pytest.mark.parametrize("groups", [1, 2, 4, 6])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("J", [1, 3])
def test_grouped_products_of_any_number_of_groups_and_a_loop_over_sets_give_the_same(
    J: int, gated: bool, groups: int, monkeypatch: Any
) -> None:
    width, adapter, sets = 16, 8, 6
    weights = HyperExpertWeights(
        *(torch.randn(sets, *shape) for shape in ((width, adapter), (adapter,), (adapter, width), (width,)))
    )
    x, assignment = torch.randn(40, width), torch.randint(0, sets - 1, (40, J))  # one set without rows
    gates = torch.rand(40, J) if gated else None
    arguments = [x, *weights, *([gates] if gated else [])]
    for tensor in arguments:
        tensor.requires_grad_()

    def run() -> list[Tensor]:
        y = generated.apply_generated(x, Assignment(assignment, gates), weights)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), arguments)]

    looped = run()
    monkeypatch.setattr(generated, "LoopedRows", generated.GroupedRows)
    monkeypatch.setattr(generated, "_MOST_GROUPS", groups)
    for grouped, by_loop in zip(run(), looped, strict=True):
        assert distance(grouped, by_loop) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [(1, 0, 70, 33, 200, 5), (0, 0, 0, 100), (31, 32, 33, 64, 65, 1)])
def test_sets_that_reach_over_the_rows_of_others_in_bfloat16_leave_them_alone(
    rows: tuple[int, ...], gated: bool
) -> None:
    of_set = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))[torch.randperm(sum(rows))]
    shapes = (len(rows), D, A), (len(rows), A), (len(rows), A, D), (len(rows), D), (sum(rows), D), (sum(rows), 1)
    numbers = [torch.randn(shape).bfloat16() for shape in shapes]

    def run(dtype: torch.dtype) -> list[Tensor]:
        *weights, x, gates = (tensor.to(dtype).requires_grad_() for tensor in numbers)
        assignment = Assignment(of_set.unsqueeze(1), gates if gated else None)
        y = generated.apply_generated(x, assignment, HyperExpertWeights(*weights))
        return [y.detach(), *torch.autograd.grad(y.sum(), [*weights, x, *([gates] if gated else [])])]

    for ours, exact in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        assert distance(ours, exact) < 4 * 2**-8


class ProductShapes(TorchDispatchMode):
    """Notes the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.add((func, *(tensor.shape for tensor in args)))
        return func(*args, **(kwargs or {}))


def test_few_shapes_of_products_occur_in_bfloat16_however_the_tokens_are_spread() -> None:
    shapes = (N := 8, D, A), (N, A), (N, A, D), (N, D)
    weights = HyperExpertWeights(*(torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes))
    x = torch.randn(2048, D, dtype=torch.bfloat16)
    with ProductShapes() as products:
        for spread in torch.rand(50, N):
            y = generated.apply_generated(x, Assignment(torch.multinomial(spread, len(x), True).unsqueeze(1)), weights)
            y.sum().backward()
    last = 5 * 50  # the last set, whose rows end with the others', takes as many as it has
    assert last < len(products.seen) < last + 5 * 30, "and not 5 products of 8 sets 50 times"


def branches_of(num_experts: int, conditioning: Any, monkeypatch: Any) -> tuple[list[HyperExperts], HyperNetwork]:
    """Two layers whose products are grouped, as on a GPU."""
    monkeypatch.setattr(generated, "LoopedRows", generated.GroupedRows)
    monkeypatch.setattr(hyper_experts, "cheaper_form", lambda *_: "per_set")
    hypernetwork = HyperNetwork(32, 16, 2, 10, 16, 8)
    wake(hypernetwork)
    encoders = [SelectionEncoder(num_experts, 16, 16, 16) for _ in range(2)]
    return [HyperExperts(encoder, layer, conditioning) for layer, encoder in enumerate(encoders)], hypernetwork


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("conditioning", "K"), [("selection", 1), ("selection", 2), ("route", 2)])
def test_with_grouped_products_and_sets_known_before_routing_nothing_waits_for_the_host(
    conditioning: str, K: int, ahead: bool, monkeypatch: Any
) -> None:
    tokens = 800
    branches, hypernetwork = branches_of(8, conditioning, monkeypatch)
    x, gates = torch.randn(tokens, 32, requires_grad=True), torch.rand(tokens, K)
    selected = random_selection(tokens, 8, K)
    with Synchronisations() as waits:
        modules = generate_ahead(branches, hypernetwork, x, K) if ahead else None
        for layer, branch in enumerate(branches):
            each = modules[layer] if modules else None
            branch(x, selected, hypernetwork, gates_TK=gates, generated=each).square().sum().backward(retain_graph=True)
    assert waits.seen == []
    assert (modules is not None) == ahead


def test_sets_not_known_before_routing_are_waited_for_once(monkeypatch: Any) -> None:
    branches, hypernetwork = branches_of(16, "selection", monkeypatch)
    x, selected = torch.randn(60, 32, requires_grad=True), random_selection(60, 16, 4)
    with Synchronisations() as waits:
        branches[0](x, selected, hypernetwork).square().sum().backward()
    assert len(waits.seen) == 1


class Sorts(TorchDispatchMode):
    """Counts sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.argsort)
        return func(*args, **(kwargs or {}))


def test_rows_are_sorted_once_even_where_modules_are_generated_again_in_the_backward_pass(monkeypatch: Any) -> None:
    branches, hypernetwork = branches_of(64, "selection", monkeypatch)
    x, selected = torch.randn(20, 32, requires_grad=True), random_selection(20, 64, 1)
    generations: list[int] = []
    hypernetwork.up_weight.register_forward_hook(lambda *_: generations.append(1))
    with Sorts() as sorts:
        branches[0](x, selected, hypernetwork, "per_set").sum().backward()
    assert len(generations) == 2
    assert sorts.count == 1
