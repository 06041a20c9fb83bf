import copy
import itertools
import math

import pytest
import torch
from model_references import build, distance, random_selection, wake
from model_references import hyper_experts as reference
from torch import Tensor, nn

from hypermoe_ds.modeling import hyper_experts as module_under_test
from hypermoe_ds.modeling.hyper_cache import KeptHyperExperts
from hypermoe_ds.modeling.hyper_costs import Sizes, cheaper_form, generated_weights_fit
from hypermoe_ds.modeling.hyper_experts import (
    HyperExperts,
    HyperNetwork,
    SelectionEncoder,
    generate_ahead,
)
from hypermoe_ds.modeling.selections import all_sets, distinct_sets, rank_sets

FORMS = ("per_set", "factored", "per_token", "auto")
SHAPES = sorted({(N, K) for N in (1, 2, 4, 8, 16, 32, 64) for K in (1, 2, 4, 8, N) if K <= N})
D, E, P, H, L, LAYER_WIDTH, B, A = 24, 12, 20, 14, 3, 5, 16, 10


def make(num_experts: int, dtype: torch.dtype = torch.float32) -> tuple[HyperExperts, HyperNetwork]:
    hypernetwork = HyperNetwork(D, H, L, LAYER_WIDTH, B, A)
    wake(hypernetwork)
    branch = HyperExperts(SelectionEncoder(num_experts, E, P, H), layer_index=1)
    return branch.to(dtype), hypernetwork.to(dtype)


def in_dtype(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(part).to(dtype)


def value_and_gradients(
    branch: HyperExperts, hypernetwork: HyperNetwork, x_TD: Tensor, selected_TK: Tensor, form: str, weight_TD: Tensor
) -> dict[str, Tensor]:
    """Output, and the gradients of a random linear functional of it, by name."""
    x_TD = x_TD.clone().requires_grad_()
    if form == "reference":
        y_TD = reference(x_TD, selected_TK, branch.encoder, hypernetwork, branch.layer_index)
    else:
        y_TD = branch(x_TD, selected_TK, hypernetwork, form)
    named = {"x": x_TD, **dict(branch.named_parameters()), **dict(hypernetwork.named_parameters())}
    # With every expert selected the plain sum over the others has no term to differentiate.
    gradients = torch.autograd.grad((y_TD * weight_TD).sum(), list(named.values()), materialize_grads=True)
    return {"y": y_TD.detach(), **dict(zip(named, gradients, strict=True))}


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_forms_agree_in_value_and_in_every_gradient(N: int, K: int) -> None:
    branch, hypernetwork = make(N)
    x, weight, selected = torch.randn(48, D), torch.randn(48, D), random_selection(48, N, K)
    exact = value_and_gradients(
        in_dtype(branch, torch.float64),
        in_dtype(hypernetwork, torch.float64),
        x.double(),
        selected,
        "per_token",
        weight.double(),
    )
    assert len(exact) == 2 + 5 + 11
    for form in FORMS:
        seen = value_and_gradients(branch, hypernetwork, x, selected, form, weight)
        for name, expected in exact.items():
            assert distance(seen[name], expected) < 1e-5, (form, name)


@torch.no_grad()
def hold_every_relu(branch: HyperExperts, hypernetwork: HyperNetwork) -> None:
    """Biases so large that half the units of each ReLU are open and half are shut, whatever comes in."""
    embedding, mlp = branch.encoder.expert_embedding, branch.encoder.mlp
    embedding.weight.div_(math.sqrt(embedding.num_embeddings))
    for bias, size in ((mlp[0].bias, 4), (hypernetwork.trunk.bias, 8), (hypernetwork.down_bias.bias, 40)):
        bias.copy_(torch.tensor([size, -size]).repeat(len(bias) // 2))


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_forms_agree_in_bfloat16_within_its_rounding(N: int, K: int) -> None:
    # Ten operations lead from the embeddings to the output and ten back; each rounds its result by at most
    # 2^-8 of it (7 bits and the hidden one), at random, so an output is off by about sqrt(10) * 2^-8. A
    # gradient sums terms of both signs that partly cancel, each with its own error: it gets the worst case,
    # 20 * 2^-8. ReLUs are held, since a rounding that carries one over zero switches a whole term of the
    # gradient, in any form: that is the kink of the function and not the form's error.
    value_bound, gradient_bound = math.sqrt(10) * 2**-8, 20 * 2**-8
    branch, hypernetwork = make(N)
    hold_every_relu(branch, hypernetwork)
    branch, hypernetwork = in_dtype(branch, torch.bfloat16), in_dtype(hypernetwork, torch.bfloat16)
    x, weight = torch.randn(48, D, dtype=torch.bfloat16), torch.randn(48, D, dtype=torch.bfloat16)
    selected = random_selection(48, N, K)
    exact = value_and_gradients(
        in_dtype(branch, torch.float64),
        in_dtype(hypernetwork, torch.float64),
        x.double(),
        selected,
        "per_token",
        weight.double(),
    )
    for form in FORMS:
        seen = value_and_gradients(branch, hypernetwork, x, selected, form, weight)
        for name, expected in exact.items():
            assert seen[name].dtype is torch.bfloat16
            assert distance(seen[name], expected) < (value_bound if name == "y" else gradient_bound), (form, name)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (4, 4), (8, 1), (8, 2), (16, 5), (64, 8)])
def test_every_form_is_the_method_written_out_token_by_token(N: int, K: int) -> None:
    branch, hypernetwork = make(N, torch.float64)
    x, weight = torch.randn(12, D, dtype=torch.float64), torch.randn(12, D, dtype=torch.float64)
    selected = random_selection(12, N, K)
    expected = value_and_gradients(branch, hypernetwork, x, selected, "reference", weight)
    for form in FORMS:
        seen = value_and_gradients(branch, hypernetwork, x, selected, form, weight)
        for name, value in expected.items():
            assert distance(seen[name], value) < 1e-12, (form, name)


def test_the_comparison_reaches_every_term_of_the_method() -> None:
    branch, hypernetwork = make(8, torch.float64)
    x, selected = torch.randn(200, D, dtype=torch.float64), random_selection(200, 8, 2)
    plain = branch(x, selected, hypernetwork, "per_token")
    assert 0.1 < plain.norm() / x.norm() < 10
    for parameter in (*branch.parameters(), *hypernetwork.parameters()):
        changed = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
            assert distance(branch(x, selected, hypernetwork, "per_token"), plain) > 0.01
            parameter.copy_(changed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("N", "K"), [(8, 2), (8, 8), (64, 8), (100, 5)])
def test_the_order_inside_the_top_k_does_not_change_a_bit(N: int, K: int, form: str) -> None:
    branch, hypernetwork = make(N)
    x, weight, selected = torch.randn(64, D), torch.randn(64, D), random_selection(64, N, K)
    selected = torch.cat([selected[:32], selected[:32].flip(1)])  # each set in two orders
    shuffled = selected.gather(1, torch.rand(64, K).argsort(dim=1))
    one = value_and_gradients(branch, hypernetwork, x, selected, form, weight)
    other = value_and_gradients(branch, hypernetwork, x, shuffled, form, weight)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_a_hyper_expert_is_decided_by_the_set_and_the_layer_alone(form: str) -> None:
    branch, hypernetwork = make(8, torch.float64)
    x = torch.randn(1, D, dtype=torch.float64).expand(4, -1)
    selected = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])
    y = branch(x, selected, hypernetwork, form)
    assert distance(y[2], y[0]) < 1e-14
    assert distance(y[3], y[0]) < 1e-14
    assert distance(y[1], y[0]) > 0.01

    company = torch.randn(30, D, dtype=torch.float64)
    crowd = branch(torch.cat([company, x[:1]]), torch.tensor([[0, 1]] * 31), hypernetwork, form)
    assert distance(crowd[-1], y[0]) < 1e-13
    mixed = torch.cat([random_selection(30, 8, 2), torch.tensor([[1, 0]])])
    assert distance(branch(torch.cat([company, x[:1]]), mixed, hypernetwork, form)[-1], y[0]) < 1e-13

    elsewhere = HyperExperts(branch.encoder, layer_index=2)
    assert distance(elsewhere(x, selected, hypernetwork, form), y) > 0.01


def test_the_branch_sends_no_gradient_to_experts_or_router() -> None:
    model = build()
    outputs: list[Tensor] = []
    layers = model.model.layers
    for layer in layers:
        layer.hyper_experts.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(input_ids=torch.randint(0, 61, (2, 9)))
    for index, output in enumerate(outputs):
        own = [*layers[index].mlp.parameters()]
        assert all(
            gradient is None
            for gradient in torch.autograd.grad(output.sum(), own, allow_unused=True, retain_graph=True)
        )
        encoder = list(layers[index].hyper_experts.parameters())
        assert all(
            gradient.any() for gradient in torch.autograd.grad(output.square().sum(), encoder, retain_graph=True)
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("N", [1, 2, 8, 64])
def test_with_every_expert_selected_the_branch_is_an_unconditional_adapter(N: int, form: str) -> None:
    branch, hypernetwork = make(N)
    selected = random_selection(20, N, N)
    assert torch.equal(branch.encoder(selected[:1]), branch.encoder.mlp(torch.zeros(1, E)))
    x = torch.randn(20, D, requires_grad=True)
    y = branch(x, selected, hypernetwork, form)
    y.sum().backward()
    assert branch.encoder.expert_embedding.weight.grad.count_nonzero() == 0
    with torch.no_grad():
        branch.encoder.expert_embedding.weight.normal_()
        assert torch.equal(branch(x, selected, hypernetwork, form), y)
        assert distance(y, reference(x, selected, branch.encoder, hypernetwork, 1)) < 1e-5


@pytest.mark.parametrize(("N", "K"), [(8, 2), (8, 7), (25, 2), (26, 4), (61, 3), (62, 3), (63, 3), (64, 8), (128, 8)])
def test_distinct_sets_are_those_that_python_counts(N: int, K: int) -> None:
    pool = random_selection(90, N, K)
    selected = pool[torch.randint(0, 90, (400,))]
    selected = selected.gather(1, torch.rand(400, K).argsort(dim=1))
    sets, inverse = distinct_sets(selected, N)
    wanted = [frozenset(row) for row in selected.tolist()]
    found = [frozenset(row) for row in sets.tolist()]
    assert len(set(found)) == len(found) == len(set(wanted))
    assert [found[i] for i in inverse.tolist()] == wanted


@pytest.mark.parametrize("N", [25, 62, 63, 64, 65, 100, 125, 128])
def test_no_two_pairs_of_experts_share_a_key(N: int) -> None:
    pairs = torch.tensor(list(itertools.combinations(range(N), 2)))
    sets, inverse = distinct_sets(pairs[torch.randperm(len(pairs))], N)
    assert len(sets) == math.comb(N, 2)
    assert inverse.unique().numel() == math.comb(N, 2)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (8, 1), (8, 2), (8, 7), (8, 8), (16, 4), (64, 2), (64, 63), (128, 127)])
def test_every_set_has_a_rank_of_its_own_whatever_the_order_of_its_experts(N: int, K: int) -> None:
    sets = all_sets(N, K, torch.device("cpu"))
    wanted = {frozenset(experts) for experts in itertools.combinations(range(N), K)}
    assert {frozenset(row) for row in sets.tolist()} == wanted
    assert len(sets) == len(wanted)
    shuffled = sets.gather(1, torch.rand(len(sets), K).argsort(dim=1))
    assert rank_sets(shuffled, N).tolist() == list(range(len(sets)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_sets_never_favour_per_set_and_more_tokens_never_favour_factored(device: str, dtype: torch.dtype) -> None:
    for sizes in (Sizes(768, 64, 128), Sizes(4096, 64, 128)):
        assert cheaper_form(65536, 8, sizes, device, dtype) == "per_set"
        for tokens in (256, 1024, 65536):
            counts = range(1, 8 * tokens, max(1, tokens // 50))
            ladder = [cheaper_form(tokens, sets, sizes, device, dtype) for sets in counts]
            assert ladder == sorted(ladder, reverse=True)
            assert set(ladder) == {"factored", "per_set"}
        ladder = [cheaper_form(tokens, 280, sizes, device, dtype) for tokens in range(1, 65536, 50)]
        assert ladder == sorted(ladder)
        assert set(ladder) == {"factored", "per_set"}


@pytest.mark.parametrize("form", ["per_set", "factored"])
def test_auto_runs_the_form_that_is_cheaper(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    branch, hypernetwork = make(64)
    seen: list[tuple[int, int]] = []

    def choose(rows: int, sets: int, *_: object) -> str:
        seen.append((rows, sets))
        return form

    monkeypatch.setattr(module_under_test, "cheaper_form", choose)
    x, selected = torch.randn(40, D), torch.tensor([[0, 1], [1, 0], [3, 4], [6, 7]] * 10)
    ran: list[str] = []
    inner = getattr(hypernetwork, f"_{form}")
    monkeypatch.setattr(hypernetwork, f"_{form}", lambda *arguments: ran.append(form) or inner(*arguments))
    y = branch(x, selected, hypernetwork)
    assert seen == [(40, 3)]
    assert ran == [form]
    assert torch.equal(y, branch(x, selected, hypernetwork, form))


@pytest.mark.parametrize(("N", "K"), [(8, 1), (8, 2), (8, 8), (64, 1)])
def test_modules_generated_for_all_layers_at_once_are_those_of_each_layer(
    N: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "cheaper_form", lambda *_: "per_set")
    hypernetwork = make(N, torch.float64)[1]
    branches = [HyperExperts(make(N, torch.float64)[0].encoder, layer) for layer in range(L)]
    x, weight = torch.randn(900, D, dtype=torch.float64), torch.randn(900, D, dtype=torch.float64)
    selected = random_selection(900, N, K)
    parameters = [*hypernetwork.parameters(), *(p for branch in branches for p in branch.parameters())]

    def values(at_once: bool) -> list[Tensor]:
        generated = generate_ahead(branches, hypernetwork, x, K) if at_once else [None] * L
        assert generated is not None
        form = "auto" if at_once else "per_token"
        ys = [
            branch(x, selected, hypernetwork, form, generated=modules)
            for branch, modules in zip(branches, generated, strict=True)
        ]
        loss = sum((y * weight).sum() * (index + 1) for index, y in enumerate(ys))
        return [*(y.detach() for y in ys), *torch.autograd.grad(loss, parameters, materialize_grads=True)]

    for at_once, each in zip(values(True), values(False), strict=True):
        assert distance(at_once, each) < 1e-12


def test_modules_that_do_not_fit_are_made_by_each_layer_and_again_in_the_backward_pass() -> None:
    branch, hypernetwork = make(64, torch.float64)
    assert generated_weights_fit(2000, 64, hypernetwork.sizes)
    assert not generated_weights_fit(20, 64, hypernetwork.sizes)
    x, weight = torch.randn(20, D, dtype=torch.float64), torch.randn(20, D, dtype=torch.float64)
    assert generate_ahead([branch], hypernetwork, x, 1) is None
    selected = random_selection(20, 64, 1)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        seen = value_and_gradients(branch, hypernetwork, x, selected, "per_set", weight)
    assert (64, A, D) not in kept
    expected = value_and_gradients(branch, hypernetwork, x, selected, "per_token", weight)
    for name, value in expected.items():
        assert distance(seen[name], value) < 1e-12, name


def gradients_of_route(
    branch: HyperExperts, hypernetwork: HyperNetwork, x: Tensor, selected: Tensor, logits: Tensor, form: str
) -> list[Tensor]:
    """Output and all gradients, the gates' too; "reference" is one HyperExpert of K = 1 for each gate."""
    x, logits = x.clone().requires_grad_(), logits.clone().requires_grad_()
    gates = torch.softmax(logits, dim=-1)
    if form == "reference":
        y = sum(
            gates[:, j : j + 1] * reference(x, selected[:, j : j + 1], branch.encoder, hypernetwork, branch.layer_index)
            for j in range(selected.shape[1])
        )
    else:
        y = branch(x, selected, hypernetwork, form, gates_TK=gates)
    named = (x, logits, *branch.parameters(), *hypernetwork.parameters())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), named, materialize_grads=True)]


@pytest.mark.parametrize(("N", "K"), [(1, 1), (8, 1), (8, 2), (8, 8), (64, 8)])
def test_route_adds_one_hyper_expert_an_expert_weighted_by_its_gate_in_every_form(N: int, K: int) -> None:
    plain, hypernetwork = make(N, torch.float64)
    branch = HyperExperts(plain.encoder, 1, "route")
    x, logits, selected = torch.randn(12, D).double(), torch.randn(12, K).double(), random_selection(12, N, K)
    expected = gradients_of_route(branch, hypernetwork, x, selected, logits, "reference")
    for form in FORMS:
        for seen, value in zip(
            gradients_of_route(branch, hypernetwork, x, selected, logits, form), expected, strict=True
        ):
            assert distance(seen, value) < 1e-12, form


def test_route_is_the_papers_model_for_one_expert_a_token_up_to_the_gate() -> None:
    plain, hypernetwork = make(8, torch.float64)
    route = HyperExperts(plain.encoder, 1, "route")
    x, gates, selected = torch.randn(30, D).double(), torch.rand(30, 1).double(), random_selection(30, 8, 1)
    papers = HyperExperts(plain.encoder, 1)(x, selected, hypernetwork)
    assert distance(route(x, selected, hypernetwork, gates_TK=gates), gates * papers) < 1e-13
    with pytest.raises(ValueError, match="gates_TK"):
        route(x, selected, hypernetwork)


@pytest.mark.parametrize(("N", "K"), [(8, 1), (16, 1), (16, 4)])
def test_modules_are_generated_once_for_the_passes_that_share_them_and_anew_in_any_other(N: int, K: int) -> None:
    branch, hypernetwork = make(N, torch.float64)
    branch.layer_index = 0
    x, selected = torch.randn(12, D).double(), random_selection(12, N, K)
    made: list[int] = []
    hypernetwork.register_forward_hook(lambda _module, inputs, _output: made.append(len(inputs[0])))

    def check(generations: int, kept: KeptHyperExperts | None = None) -> None:
        with torch.no_grad():
            expected = branch(x, selected, hypernetwork, "per_token")
            made.clear()
            ahead = generate_ahead([branch], hypernetwork, x, K, kept) if kept else None
            y = branch(x, selected, hypernetwork, generated=ahead[0] if ahead else None, kept=kept)
            assert distance(y, expected) < 1e-12
        assert len(made) == generations

    kept = KeptHyperExperts()
    check(generations=1, kept=kept)
    check(generations=0, kept=kept)
    hypernetwork.up_bias.bias.data += 1  # no version counter sees it
    check(generations=1)
    check(generations=1, kept=KeptHyperExperts())


def test_only_as_many_modules_are_kept_as_there_is_room_for() -> None:
    branch, hypernetwork = make(16, torch.float64)
    x, kept = torch.randn(12, D).double(), KeptHyperExperts()
    with torch.no_grad():
        for _ in range(12):
            selected = random_selection(12, 16, 4)
            y = branch(x, selected, hypernetwork, kept=kept)
            assert distance(y, branch(x, selected, hypernetwork, "per_token")) < 1e-12
            cache = kept.layer(branch.layer_index, 0)
            assert len(cache._row_of_set) <= cache.capacity == B


@pytest.mark.parametrize(("N", "K"), [(8, 1), (8, 2)])
def test_under_autocast_every_form_returns_what_its_matrix_products_return(N: int, K: int) -> None:
    branch, hypernetwork = make(N)
    x, selected = torch.randn(40, D), random_selection(40, N, K)
    expected = branch(x, selected, hypernetwork, "per_token")
    for form in FORMS:
        with torch.autocast("cpu", torch.bfloat16):
            y = branch(x, selected, hypernetwork, form)
        assert y.dtype is torch.bfloat16, form
        assert distance(y, expected) < 10 * 2**-8, form
