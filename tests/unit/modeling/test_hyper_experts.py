import copy
import itertools
import math

import pytest
import torch
from model_references import build, distance, random_selection, scale_up_generated_weights
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
from hypermoe_ds.modeling.selections import all_selections, distinct_selections, selection_ids

FORMS = ("per_set", "factored", "per_token", "auto")
SHAPES = sorted({(N, K) for N in (1, 2, 4, 8, 16, 32, 64) for K in (1, 2, 4, 8, N) if K <= N})
D, E, P, H, L, LAYER_WIDTH, B, A = 24, 12, 20, 14, 3, 5, 16, 10


def make(num_experts: int, dtype: torch.dtype = torch.float32) -> tuple[HyperExperts, HyperNetwork]:
    hypernetwork = HyperNetwork(D, H, L, LAYER_WIDTH, B, A)
    scale_up_generated_weights(hypernetwork)
    layer = HyperExperts(SelectionEncoder(num_experts, E, P, H), layer_index=1)
    return layer.to(dtype), hypernetwork.to(dtype)


def in_dtype(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(part).to(dtype)


def value_and_gradients(
    layer: HyperExperts, hypernetwork: HyperNetwork, x_TD: Tensor, selected_TK: Tensor, form: str, weight_TD: Tensor
) -> dict[str, Tensor]:
    """Return the output and the gradients of sum(output * weight), by name."""
    x_TD = x_TD.clone().requires_grad_()
    if form == "reference":
        y_TD = reference(x_TD, selected_TK, layer.encoder, hypernetwork, layer.layer_index)
    else:
        y_TD = layer(x_TD, selected_TK, hypernetwork, form)
    named = {"x": x_TD, **dict(layer.named_parameters()), **dict(hypernetwork.named_parameters())}
    # If all experts are selected, the reference sums no embeddings, so the embeddings have no gradient.
    gradients = torch.autograd.grad((y_TD * weight_TD).sum(), list(named.values()), materialize_grads=True)
    return {"y": y_TD.detach(), **dict(zip(named, gradients, strict=True))}


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_all_forms_have_the_same_value_and_gradients(N: int, K: int) -> None:
    layer, hypernetwork = make(N)
    x, weight, selected = torch.randn(48, D), torch.randn(48, D), random_selection(48, N, K)
    exact = value_and_gradients(
        in_dtype(layer, torch.float64),
        in_dtype(hypernetwork, torch.float64),
        x.double(),
        selected,
        "per_token",
        weight.double(),
    )
    assert len(exact) == 2 + 5 + 11
    for form in FORMS:
        seen = value_and_gradients(layer, hypernetwork, x, selected, form, weight)
        for name, expected in exact.items():
            assert distance(seen[name], expected) < 1e-5, (form, name)


@torch.no_grad()
def fix_relu_signs(layer: HyperExperts, hypernetwork: HyperNetwork) -> None:
    """Set biases so large that, for any input, half the units of each ReLU are positive and half are zero."""
    embedding, mlp = layer.encoder.expert_embedding, layer.encoder.mlp
    embedding.weight.div_(math.sqrt(embedding.num_embeddings))
    for bias, size in ((mlp[0].bias, 4), (hypernetwork.trunk.bias, 8), (hypernetwork.down_bias.bias, 40)):
        bias.copy_(torch.tensor([size, -size]).repeat(len(bias) // 2))


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_all_forms_agree_in_bfloat16_within_rounding(N: int, K: int) -> None:
    # The forward pass has ten operations between embeddings and output, and the backward pass ten more. Each has a
    # relative rounding error of at most 2^-8. In the output, ten random errors add up to about sqrt(10) * 2^-8. In a
    # gradient, terms of both signs cancel but their errors do not, so its bound is the worst case of 20 * 2^-8. The
    # signs of the ReLUs are fixed, because a rounding error that changes a sign removes a term of the gradient.
    value_bound, gradient_bound = math.sqrt(10) * 2**-8, 20 * 2**-8
    layer, hypernetwork = make(N)
    fix_relu_signs(layer, hypernetwork)
    layer, hypernetwork = in_dtype(layer, torch.bfloat16), in_dtype(hypernetwork, torch.bfloat16)
    x, weight = torch.randn(48, D, dtype=torch.bfloat16), torch.randn(48, D, dtype=torch.bfloat16)
    selected = random_selection(48, N, K)
    exact = value_and_gradients(
        in_dtype(layer, torch.float64),
        in_dtype(hypernetwork, torch.float64),
        x.double(),
        selected,
        "per_token",
        weight.double(),
    )
    for form in FORMS:
        seen = value_and_gradients(layer, hypernetwork, x, selected, form, weight)
        for name, expected in exact.items():
            assert seen[name].dtype is torch.bfloat16
            assert distance(seen[name], expected) < (value_bound if name == "y" else gradient_bound), (form, name)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (4, 4), (8, 1), (8, 2), (16, 5), (64, 8)])
def test_every_form_matches_the_reference_implementation(N: int, K: int) -> None:
    layer, hypernetwork = make(N, torch.float64)
    x, weight = torch.randn(12, D, dtype=torch.float64), torch.randn(12, D, dtype=torch.float64)
    selected = random_selection(12, N, K)
    expected = value_and_gradients(layer, hypernetwork, x, selected, "reference", weight)
    for form in FORMS:
        seen = value_and_gradients(layer, hypernetwork, x, selected, form, weight)
        for name, value in expected.items():
            assert distance(seen[name], value) < 1e-12, (form, name)


def test_every_parameter_affects_the_output() -> None:
    layer, hypernetwork = make(8, torch.float64)
    x, selected = torch.randn(200, D, dtype=torch.float64), random_selection(200, 8, 2)
    plain = layer(x, selected, hypernetwork, "per_token")
    assert 0.1 < plain.norm() / x.norm() < 10
    for parameter in (*layer.parameters(), *hypernetwork.parameters()):
        changed = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
            assert distance(layer(x, selected, hypernetwork, "per_token"), plain) > 0.01
            parameter.copy_(changed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("N", "K"), [(8, 2), (8, 8), (64, 8), (100, 5)])
def test_results_are_bitwise_independent_of_the_order_of_the_top_k(N: int, K: int, form: str) -> None:
    layer, hypernetwork = make(N)
    x, weight, selected = torch.randn(64, D), torch.randn(64, D), random_selection(64, N, K)
    selected = torch.cat([selected[:32], selected[:32].flip(1)])  # each set of experts in two orders
    shuffled = selected.gather(1, torch.rand(64, K).argsort(dim=1))
    first = value_and_gradients(layer, hypernetwork, x, selected, form, weight)
    second = value_and_gradients(layer, hypernetwork, x, shuffled, form, weight)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_a_hyper_expert_depends_only_on_the_selection_and_the_layer(form: str) -> None:
    layer, hypernetwork = make(8, torch.float64)
    x = torch.randn(1, D, dtype=torch.float64).expand(4, -1)
    selected = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])
    y = layer(x, selected, hypernetwork, form)
    assert distance(y[2], y[0]) < 1e-14
    assert distance(y[3], y[0]) < 1e-14
    assert distance(y[1], y[0]) > 0.01

    other_tokens = torch.randn(30, D, dtype=torch.float64)
    batch = layer(torch.cat([other_tokens, x[:1]]), torch.tensor([[0, 1]] * 31), hypernetwork, form)
    assert distance(batch[-1], y[0]) < 1e-13
    mixed = torch.cat([random_selection(30, 8, 2), torch.tensor([[1, 0]])])
    assert distance(layer(torch.cat([other_tokens, x[:1]]), mixed, hypernetwork, form)[-1], y[0]) < 1e-13

    other_layer = HyperExperts(layer.encoder, layer_index=2)
    assert distance(other_layer(x, selected, hypernetwork, form), y) > 0.01


def test_hyper_experts_send_no_gradient_to_experts_or_router() -> None:
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
def test_with_all_experts_selected_the_hyper_expert_is_an_unconditional_adapter(N: int, form: str) -> None:
    layer, hypernetwork = make(N)
    selected = random_selection(20, N, N)
    assert torch.equal(layer.encoder(selected[:1]), layer.encoder.mlp(torch.zeros(1, E)))
    x = torch.randn(20, D, requires_grad=True)
    y = layer(x, selected, hypernetwork, form)
    y.sum().backward()
    assert layer.encoder.expert_embedding.weight.grad.count_nonzero() == 0
    with torch.no_grad():
        layer.encoder.expert_embedding.weight.normal_()
        assert torch.equal(layer(x, selected, hypernetwork, form), y)
        assert distance(y, reference(x, selected, layer.encoder, hypernetwork, 1)) < 1e-5


@pytest.mark.parametrize(("N", "K"), [(8, 2), (8, 7), (25, 2), (26, 4), (61, 3), (62, 3), (63, 3), (64, 8), (128, 8)])
def test_distinct_selections_match_python_sets(N: int, K: int) -> None:
    pool = random_selection(90, N, K)
    selected = pool[torch.randint(0, 90, (400,))]
    selected = selected.gather(1, torch.rand(400, K).argsort(dim=1))
    sets, inverse = distinct_selections(selected, N)
    wanted = [frozenset(row) for row in selected.tolist()]
    found = [frozenset(row) for row in sets.tolist()]
    assert len(set(found)) == len(found) == len(set(wanted))
    assert [found[i] for i in inverse.tolist()] == wanted


@pytest.mark.parametrize("N", [25, 62, 63, 64, 65, 100, 125, 128])
def test_different_pairs_of_experts_have_different_keys(N: int) -> None:
    pairs = torch.tensor(list(itertools.combinations(range(N), 2)))
    sets, inverse = distinct_selections(pairs[torch.randperm(len(pairs))], N)
    assert len(sets) == math.comb(N, 2)
    assert inverse.unique().numel() == math.comb(N, 2)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (8, 1), (8, 2), (8, 7), (8, 8), (16, 4), (64, 2), (64, 63), (128, 127)])
def test_every_set_has_a_unique_rank_for_any_order_of_its_experts(N: int, K: int) -> None:
    sets = all_selections(N, K, torch.device("cpu"))
    wanted = {frozenset(experts) for experts in itertools.combinations(range(N), K)}
    assert {frozenset(row) for row in sets.tolist()} == wanted
    assert len(sets) == len(wanted)
    shuffled = sets.gather(1, torch.rand(len(sets), K).argsort(dim=1))
    assert selection_ids(shuffled, N).tolist() == list(range(len(sets)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_selections_never_favour_per_set_and_more_tokens_never_favour_factored(
    device: str, dtype: torch.dtype
) -> None:
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
def test_auto_uses_the_cheaper_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hypernetwork = make(64)
    seen: list[tuple[int, int]] = []

    def choose(rows: int, sets: int, *_: object) -> str:
        seen.append((rows, sets))
        return form

    monkeypatch.setattr(module_under_test, "cheaper_form", choose)
    x, selected = torch.randn(40, D), torch.tensor([[0, 1], [1, 0], [3, 4], [6, 7]] * 10)
    ran: list[str] = []
    inner = getattr(hypernetwork, f"_{form}")
    monkeypatch.setattr(hypernetwork, f"_{form}", lambda *arguments: ran.append(form) or inner(*arguments))
    y = layer(x, selected, hypernetwork)
    assert seen == [(40, 3)]
    assert ran == [form]
    assert torch.equal(y, layer(x, selected, hypernetwork, form))


@pytest.mark.parametrize(("N", "K"), [(8, 1), (8, 2), (8, 8), (64, 1)])
def test_generating_all_layers_at_once_matches_generating_layer_by_layer(
    N: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "cheaper_form", lambda *_: "per_set")
    hypernetwork = make(N, torch.float64)[1]
    layers = [HyperExperts(make(N, torch.float64)[0].encoder, layer) for layer in range(L)]
    x, weight = torch.randn(900, D, dtype=torch.float64), torch.randn(900, D, dtype=torch.float64)
    selected = random_selection(900, N, K)
    parameters = [*hypernetwork.parameters(), *(p for layer in layers for p in layer.parameters())]

    def values(at_once: bool) -> list[Tensor]:
        generated = generate_ahead(layers, hypernetwork, x, K) if at_once else [None] * L
        assert generated is not None
        form = "auto" if at_once else "per_token"
        ys = [
            layer(x, selected, hypernetwork, form, generated=weights)
            for layer, weights in zip(layers, generated, strict=True)
        ]
        loss = sum((y * weight).sum() * (index + 1) for index, y in enumerate(ys))
        return [*(y.detach() for y in ys), *torch.autograd.grad(loss, parameters, materialize_grads=True)]

    for at_once, each in zip(values(True), values(False), strict=True):
        assert distance(at_once, each) < 1e-12


def test_weights_that_do_not_fit_are_recomputed_in_the_backward_pass() -> None:
    layer, hypernetwork = make(64, torch.float64)
    assert generated_weights_fit(2000, 64, hypernetwork.sizes)
    assert not generated_weights_fit(20, 64, hypernetwork.sizes)
    x, weight = torch.randn(20, D, dtype=torch.float64), torch.randn(20, D, dtype=torch.float64)
    assert generate_ahead([layer], hypernetwork, x, 1) is None
    selected = random_selection(20, 64, 1)
    saved_shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_shapes.append(t.shape) or t, lambda t: t):
        seen = value_and_gradients(layer, hypernetwork, x, selected, "per_set", weight)
    assert (64, A, D) not in saved_shapes
    expected = value_and_gradients(layer, hypernetwork, x, selected, "per_token", weight)
    for name, value in expected.items():
        assert distance(seen[name], value) < 1e-12, name


def gradients_of_route(
    layer: HyperExperts, hypernetwork: HyperNetwork, x: Tensor, selected: Tensor, logits: Tensor, form: str
) -> list[Tensor]:
    """Return the output and all gradients, including those of the logits.

    The form "reference" sums, for each gate, the output of one HyperExpert with K = 1.
    """
    x, logits = x.clone().requires_grad_(), logits.clone().requires_grad_()
    gates = torch.softmax(logits, dim=-1)
    if form == "reference":
        y = sum(
            gates[:, j : j + 1] * reference(x, selected[:, j : j + 1], layer.encoder, hypernetwork, layer.layer_index)
            for j in range(selected.shape[1])
        )
    else:
        y = layer(x, selected, hypernetwork, form, gates_TK=gates)
    named = (x, logits, *layer.parameters(), *hypernetwork.parameters())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), named, materialize_grads=True)]


@pytest.mark.parametrize(("N", "K"), [(1, 1), (8, 1), (8, 2), (8, 8), (64, 8)])
def test_route_sums_one_hyper_expert_per_expert_weighted_by_its_gate(N: int, K: int) -> None:
    plain, hypernetwork = make(N, torch.float64)
    layer = HyperExperts(plain.encoder, 1, "route")
    x, logits, selected = torch.randn(12, D).double(), torch.randn(12, K).double(), random_selection(12, N, K)
    expected = gradients_of_route(layer, hypernetwork, x, selected, logits, "reference")
    for form in FORMS:
        for seen, value in zip(
            gradients_of_route(layer, hypernetwork, x, selected, logits, form), expected, strict=True
        ):
            assert distance(seen, value) < 1e-12, form


def test_route_with_one_expert_per_token_is_the_published_model_times_the_gate() -> None:
    plain, hypernetwork = make(8, torch.float64)
    route = HyperExperts(plain.encoder, 1, "route")
    x, gates, selected = torch.randn(30, D).double(), torch.rand(30, 1).double(), random_selection(30, 8, 1)
    published = HyperExperts(plain.encoder, 1)(x, selected, hypernetwork)
    assert distance(route(x, selected, hypernetwork, gates_TK=gates), gates * published) < 1e-13
    with pytest.raises(ValueError, match="gates_TK"):
        route(x, selected, hypernetwork)


@pytest.mark.parametrize(("N", "K"), [(8, 1), (16, 1), (16, 4)])
def test_passes_with_the_same_cache_generate_once_and_others_generate_again(N: int, K: int) -> None:
    layer, hypernetwork = make(N, torch.float64)
    layer.layer_index = 0
    x, selected = torch.randn(12, D).double(), random_selection(12, N, K)
    calls: list[int] = []
    hypernetwork.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))

    def check(generations: int, kept: KeptHyperExperts | None = None) -> None:
        with torch.no_grad():
            expected = layer(x, selected, hypernetwork, "per_token")
            calls.clear()
            ahead = generate_ahead([layer], hypernetwork, x, K, kept) if kept else None
            y = layer(x, selected, hypernetwork, generated=ahead[0] if ahead else None, kept=kept)
            assert distance(y, expected) < 1e-12
        assert len(calls) == generations

    kept = KeptHyperExperts()
    check(generations=1, kept=kept)
    check(generations=0, kept=kept)
    hypernetwork.up_bias.bias.data += 1  # this change does not increase the tensor's version counter
    check(generations=1)
    check(generations=1, kept=KeptHyperExperts())


def test_the_cache_does_not_exceed_its_capacity() -> None:
    layer, hypernetwork = make(16, torch.float64)
    x, kept = torch.randn(12, D).double(), KeptHyperExperts()
    with torch.no_grad():
        for _ in range(12):
            selected = random_selection(12, 16, 4)
            y = layer(x, selected, hypernetwork, kept=kept)
            assert distance(y, layer(x, selected, hypernetwork, "per_token")) < 1e-12
            cache = kept.layer(layer.layer_index, 0)
            assert len(cache._row_of_set) <= cache.capacity == B


@pytest.mark.parametrize(("N", "K"), [(8, 1), (8, 2)])
def test_under_autocast_every_form_returns_bfloat16(N: int, K: int) -> None:
    layer, hypernetwork = make(N)
    x, selected = torch.randn(40, D), random_selection(40, N, K)
    expected = layer(x, selected, hypernetwork, "per_token")
    for form in FORMS:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, selected, hypernetwork, form)
        assert y.dtype is torch.bfloat16, form
        assert distance(y, expected) < 10 * 2**-8, form
