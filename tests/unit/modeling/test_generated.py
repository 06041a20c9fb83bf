from typing import Any

import pytest
import torch
from model_references import distance, random_selection, scale_up_generated_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypermoe_ds.modeling import generated, hyper_experts
from hypermoe_ds.modeling.generated import Assignment, HyperExpertWeights
from hypermoe_ds.modeling.hyper_experts import HyperExperts, HyperNetwork, SelectionEncoder, generate_ahead
from tests.helpers.synchronisations import Synchronisations

D, A = 24, 10


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "J"), [(1, 1), (4, 1), (1, 3), (2, 2), (5, 1)])
def test_applying_hyper_experts_row_by_row_matches_the_batched_product(tokens: int, J: int, gated: bool) -> None:
    weights = HyperExpertWeights(*(torch.randn(6, *shape) for shape in ((16, 8), (8,), (8, 16), (16,))))
    x, ids, gates = torch.randn(9, 16), torch.randint(0, 6, (9, J)), torch.rand(9, J)
    expected = generated.apply_generated(x.requires_grad_(), Assignment(ids, gates if gated else None), weights)
    with torch.no_grad():
        assignment = Assignment(ids[:tokens], gates[:tokens] if gated else None)
        assert distance(generated.apply_generated(x[:tokens], assignment, weights), expected[:tokens]) < 1e-6


@pytest.mark.parametrize("groups", [1, 2, 4, 6])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("J", [1, 3])
def test_grouped_products_match_the_loop_for_any_number_of_groups(
    J: int, gated: bool, groups: int, monkeypatch: Any
) -> None:
    D, A, U = 16, 8, 6
    weights = HyperExpertWeights(*(torch.randn(U, *shape) for shape in ((D, A), (A,), (A, D), (D,))))
    x, ids = torch.randn(40, D), torch.randint(0, U - 1, (40, J))  # the last HyperExpert has no rows
    gates = torch.rand(40, J) if gated else None
    arguments = [x, *weights, *([gates] if gated else [])]
    for tensor in arguments:
        tensor.requires_grad_()

    def run() -> list[Tensor]:
        y = generated.apply_generated(x, Assignment(ids, gates), weights)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), arguments)]

    looped = run()
    monkeypatch.setattr(generated, "LoopedRows", generated.GroupedRows)
    monkeypatch.setattr(generated, "_MOST_GROUPS", groups)
    for grouped, from_loop in zip(run(), looped, strict=True):
        assert distance(grouped, from_loop) < 1e-5


def test_gradients_of_unused_hyper_experts_are_zero_if_grouped_products_leave_arbitrary_values(
    monkeypatch: Any,
) -> None:
    grouped_mm = torch._grouped_mm

    def like_b200(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
        product = grouped_mm(x, y, offs=offs)
        if y.dim() == 2:  # the product sums over the rows
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = 7
        return product

    weights = HyperExpertWeights(*(torch.randn(6, *shape) for shape in ((16, 8), (8,), (8, 16), (16,))))
    ids = torch.tensor([0, 2, 2, 5]).repeat(10).unsqueeze(1)
    for weight in weights:
        weight.requires_grad_()

    def run() -> list[Tensor]:
        y = generated.apply_generated(torch.ones(40, 16), Assignment(ids, None), weights)
        return list(torch.autograd.grad(y.square().sum(), weights))

    looped = run()
    monkeypatch.setattr(generated, "LoopedRows", generated.GroupedRows)
    monkeypatch.setattr(torch, "_grouped_mm", like_b200)
    for masked in (False, True):
        monkeypatch.setattr(generated, "_fills_empty_groups", lambda _, masked=masked: masked)
        differences = [distance(grouped, from_loop) for grouped, from_loop in zip(run(), looped, strict=True)]
        assert (max(differences) < 1e-5) == masked
        assert (min(grad[[1, 3, 4]].abs().sum() == 0 for grad in run())) == masked


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [(1, 0, 70, 33, 200, 5), (0, 0, 0, 100), (31, 32, 33, 64, 65, 1)])
def test_padded_bfloat16_products_do_not_change_rows_of_other_hyper_experts(rows: tuple[int, ...], gated: bool) -> None:
    ids_R = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))[torch.randperm(sum(rows))]
    shapes = (len(rows), D, A), (len(rows), A), (len(rows), A, D), (len(rows), D), (sum(rows), D), (sum(rows), 1)
    numbers = [torch.randn(shape).bfloat16() for shape in shapes]

    def run(dtype: torch.dtype) -> list[Tensor]:
        *weights, x, gates = (tensor.to(dtype).requires_grad_() for tensor in numbers)
        assignment = Assignment(ids_R.unsqueeze(1), gates if gated else None)
        y = generated.apply_generated(x, assignment, HyperExpertWeights(*weights))
        return [y.detach(), *torch.autograd.grad(y.sum(), [*weights, x, *([gates] if gated else [])])]

    for ours, exact in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        assert distance(ours, exact) < 4 * 2**-8


class ProductShapes(TorchDispatchMode):
    """Context manager that records the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.add((func, *(tensor.shape for tensor in args)))
        return func(*args, **(kwargs or {}))


def test_bfloat16_products_have_few_different_shapes_for_any_load() -> None:
    shapes = (N := 8, D, A), (N, A), (N, A, D), (N, D)
    weights = HyperExpertWeights(*(torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes))
    x = torch.randn(2048, D, dtype=torch.bfloat16)
    with ProductShapes() as products:
        for spread in torch.rand(50, N):
            y = generated.apply_generated(x, Assignment(torch.multinomial(spread, len(x), True).unsqueeze(1)), weights)
            y.sum().backward()
    # The rows of the last HyperExpert cannot be padded, so their number varies.
    last = 5 * 50
    assert last < len(products.seen) < last + 5 * 30, (
        "without padding: 5 products for each of 8 HyperExperts in each of 50 steps"
    )


def two_layers(num_experts: int, conditioning: Any, monkeypatch: Any) -> tuple[list[HyperExperts], HyperNetwork]:
    """Return the HyperExperts of two layers and their hypernetwork, and use grouped products as on a GPU."""
    monkeypatch.setattr(generated, "LoopedRows", generated.GroupedRows)
    monkeypatch.setattr(hyper_experts, "cheaper_form", lambda *_: "per_set")
    hypernetwork = HyperNetwork(32, 16, 2, 10, 16, 8)
    scale_up_generated_weights(hypernetwork)
    encoders = [SelectionEncoder(num_experts, 16, 16, 16) for _ in range(2)]
    return [HyperExperts(encoder, layer, conditioning) for layer, encoder in enumerate(encoders)], hypernetwork


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("conditioning", "K"), [("selection", 1), ("selection", 2), ("route", 2)])
def test_grouped_products_of_known_selections_need_no_synchronisation(
    conditioning: str, K: int, ahead: bool, monkeypatch: Any
) -> None:
    tokens = 800
    layers, hypernetwork = two_layers(8, conditioning, monkeypatch)
    x, gates = torch.randn(tokens, 32, requires_grad=True), torch.rand(tokens, K)
    selected = random_selection(tokens, 8, K)
    with Synchronisations() as synchronisations:
        weights = generate_ahead(layers, hypernetwork, x, K) if ahead else None
        for index, layer in enumerate(layers):
            layer_weights = weights[index] if weights else None
            layer(x, selected, hypernetwork, gates_TK=gates, generated=layer_weights).square().sum().backward(
                retain_graph=True
            )
    assert synchronisations.seen == []
    assert (weights is not None) == ahead


def test_unknown_selections_need_one_synchronisation(monkeypatch: Any) -> None:
    layers, hypernetwork = two_layers(16, "selection", monkeypatch)
    x, selected = torch.randn(60, 32, requires_grad=True), random_selection(60, 16, 4)
    with Synchronisations() as synchronisations:
        layers[0](x, selected, hypernetwork).square().sum().backward()
    assert len(synchronisations.seen) == 1


class Sorts(TorchDispatchMode):
    """Context manager that counts sorting operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.argsort)
        return func(*args, **(kwargs or {}))


def test_rows_are_sorted_only_once_if_backward_generates_the_weights_again(monkeypatch: Any) -> None:
    layers, hypernetwork = two_layers(64, "selection", monkeypatch)
    x, selected = torch.randn(20, 32, requires_grad=True), random_selection(20, 64, 1)
    generations: list[int] = []
    hypernetwork.up_weight.register_forward_hook(lambda *_: generations.append(1))
    with Sorts() as sorts:
        layers[0](x, selected, hypernetwork, "per_set").sum().backward()
    assert len(generations) == 2
    assert sorts.count == 1
