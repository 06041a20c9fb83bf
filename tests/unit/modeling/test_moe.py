import copy
import itertools

import pytest
import torch
from model_references import SMALL, build, distance, moe_block, random_selection, switch_loss, z_loss
from torch import Tensor, nn

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.moe import Fp32Gate, MoEBlock, Routing, load_balancing_loss, observe_router, router_z_loss

N = 6


def make_block(**overrides: object) -> MoEBlock:
    """Build a block with weights of order one, so that all experts and gates affect the output."""
    block = MoEBlock(HyperMoEConfig(**{**SMALL, "num_experts": N, **overrides}))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("K", [1, 2, N])
def test_the_block_matches_the_reference_implementation(K: int, shared: int, renormalise: bool) -> None:
    block = make_block(num_experts_per_tok=K, shared_expert_size=shared, norm_topk_prob=renormalise)
    exact = copy.deepcopy(block).double()
    x, weight = torch.randn(2, 11, 32, requires_grad=True), torch.randn(2, 11, 32)
    exact_x = x.detach().double().requires_grad_()

    y = block(x)
    (y * weight).sum().backward()
    rows, selected = moe_block(exact, exact_x.flatten(0, 1), K, renormalise)
    (rows.view_as(exact_x) * weight).sum().backward()

    assert len(selected.unique()) == N
    assert distance(y, rows.view_as(y)) < 1e-5
    assert distance(x.grad, exact_x.grad) < 1e-5
    for name, parameter in exact.named_parameters():
        if K == 1 or not name.startswith("router"):
            assert parameter.grad.norm() > 0.1
        if parameter.grad.norm() > 1e-9:
            assert distance(block.get_parameter(name).grad, parameter.grad) < 1e-5, name


@pytest.mark.parametrize("K", [1, 2])
def test_experts_without_tokens_have_zero_gradients(K: int) -> None:
    block = make_block(num_experts_per_tok=K)
    x = torch.randn(1, 1, 32).expand(1, 5, 32)
    block(x).sum().backward()
    used = [bool(gradient.any()) for gradient in block.experts.down_proj.grad]
    assert sum(used) == K
    assert torch.isfinite(block.experts.gate_up_proj.grad).all()


@pytest.mark.parametrize("renormalise", [False, True])
def test_with_top_1_the_gate_is_the_probability_and_the_router_has_a_gradient(renormalise: bool) -> None:
    block = make_block(num_experts_per_tok=1, norm_topk_prob=renormalise)
    x = torch.randn(7, 32)
    gates, selected, _ = block.router(x)
    probability = torch.softmax(x @ block.router.gate.weight.T, dim=-1)
    assert torch.allclose(gates, probability.max(-1, keepdim=True).values)
    assert torch.equal(selected, probability.argmax(-1, keepdim=True))
    block(x.unsqueeze(0)).square().sum().backward()
    assert block.router.gate.weight.grad.norm() > 0.1


def test_renormalised_gates_sum_to_one_and_keep_their_ratios() -> None:
    x = torch.randn(40, 32)
    raw_block = make_block(num_experts_per_tok=3)
    block = make_block(num_experts_per_tok=3, norm_topk_prob=True)
    block.load_state_dict(raw_block.state_dict())
    raw, raw_selected, _ = raw_block.router(x)
    gates, selected, _ = block.router(x)
    assert torch.allclose(gates.sum(-1), torch.ones(40))
    assert raw.sum(-1).max() < 1
    assert torch.allclose(gates, raw / raw.sum(-1, keepdim=True))
    assert torch.equal(selected, raw_selected)


def test_gates_are_computed_in_fp32_in_a_bfloat16_model() -> None:
    block = make_block(num_experts_per_tok=2).to(torch.bfloat16)
    x = torch.randn(1, 30, 32, dtype=torch.bfloat16)
    gates, selected, _ = block.router(x.flatten(0, 1))
    probability = torch.softmax(block.router.gate(x.flatten(0, 1)).float(), dim=-1)
    assert gates.dtype is torch.float32
    assert torch.equal(gates, probability.gather(1, selected))
    assert block(x).dtype is torch.bfloat16


def test_experts_are_initialised_differently() -> None:
    model = HyperMoEForCausalLM(HyperMoEConfig(**SMALL))
    for name in ("gate_up_proj", "down_proj"):
        experts = [expert for layer in model.model.layers for expert in getattr(layer.mlp.experts, name)]
        assert len(experts) == 12
        for first, second in itertools.combinations(experts, 2):
            cosine = torch.dot(first.flatten(), second.flatten()) / (first.norm() * second.norm())
            assert abs(cosine.item()) < 5 / first.numel() ** 0.5


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_balance_loss_matches_switch_transformers(K: int) -> None:
    logits = torch.randn(23, N, dtype=torch.float64, requires_grad=True)
    selected = logits.detach().topk(K).indices
    seen, expected = load_balancing_loss(logits, selected), switch_loss(logits, selected)
    assert seen.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(seen, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert distance(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("K", [1, 2, N])
def test_the_balance_loss_is_one_for_an_even_load_and_n_for_a_collapsed_router(K: int) -> None:
    selected = torch.tensor([[(token + k) % N for k in range(K)] for token in range(2 * N)])
    assert load_balancing_loss(torch.zeros(2 * N, N), selected).item() == pytest.approx(1, abs=1e-6)
    collapsed = torch.zeros(2 * N, N)
    collapsed[:, 2] = 50
    assert load_balancing_loss(collapsed, torch.full((2 * N, 1), 2)).item() == pytest.approx(N, rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loads_summed_over_ranks_give_the_loss_and_gradient_of_the_full_batch(ranks: int) -> None:
    logits = torch.randn(ranks * 8, N)
    logits += torch.arange(N).float() * torch.linspace(-1, 1, ranks * 8).unsqueeze(1)  # ranks prefer different experts
    logits.requires_grad_()
    selected = logits.detach().topk(2).indices
    full_batch = load_balancing_loss(logits, selected)
    (expected_gradient,) = torch.autograd.grad(full_batch, logits)

    counts = [torch.bincount(part.flatten(), minlength=N).float() for part in selected.chunk(ranks)]
    losses, unsynchronised = [], []
    for rank, (part, part_selected) in enumerate(zip(logits.chunk(ranks), selected.chunk(ranks), strict=True)):

        def sum_over_ranks(local_counts: Tensor, rank: int = rank) -> Tensor:
            assert torch.equal(local_counts, counts[rank])
            return torch.stack(counts).sum(0)

        losses.append(load_balancing_loss(part, part_selected, sum_over_ranks))
        unsynchronised.append(load_balancing_loss(part, part_selected))
    mean = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(mean, logits)
    assert mean.item() == pytest.approx(full_batch.item(), rel=1e-6)
    assert distance(gradient, expected_gradient) < 1e-6
    if ranks > 1:
        assert abs(torch.stack(unsynchronised).mean().item() - full_batch.item()) > 0.01


def test_the_z_loss_is_the_mean_squared_logsumexp() -> None:
    logits = (3 * torch.randn(19, N, dtype=torch.float64)).requires_grad_()
    seen, expected = router_z_loss(logits), z_loss(logits)
    assert seen.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(seen, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert distance(gradient, expected_gradient) < 1e-5


def test_routing_losses_are_computed_in_fp32() -> None:
    logits = torch.randn(64, N).to(torch.bfloat16)
    selected = random_selection(64, N, 2)
    assert torch.equal(load_balancing_loss(logits, selected), load_balancing_loss(logits.float(), selected))
    assert torch.equal(router_z_loss(logits), router_z_loss(logits.float()))


def count_hooks(block: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in block.modules())


def test_observe_router_returns_the_routing_and_removes_its_hooks() -> None:
    block = make_block()
    before = count_hooks(block)
    routings = []
    for _ in range(2):
        x = torch.randn(1, 9, 32)
        seen: list[Routing] = []
        with observe_router(block.router, seen.append):
            assert count_hooks(block) > before
            block(x)
        assert count_hooks(block) == before
        (routing,) = seen
        routings.append(routing)
        gates, selected, _ = block.router(x.flatten(0, 1))
        assert torch.equal(routing.selected_TK, selected)
        assert torch.equal(torch.softmax(routing.logits_TN, -1).gather(1, selected), gates)
        (gradient,) = torch.autograd.grad(routing.logits_TN.sum(), block.router.gate.weight)
        assert gradient.any()
    block(torch.randn(1, 9, 32))
    assert len(seen) == 1, "routing is not recorded after the context ends"
    assert not torch.equal(routings[0].logits_TN, routings[1].logits_TN)


def test_observe_router_removes_its_hooks_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block()

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(block.experts, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"), observe_router(block.router, lambda _: None):
        block(torch.randn(1, 9, 32))
    assert count_hooks(block) == 0


def test_a_forward_pass_leaves_no_hooks() -> None:
    model = build()
    model(input_ids=torch.randint(0, 61, (1, 9)))
    assert count_hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_router_has_exact_logits_and_saves_tensors_in_the_model_dtype(dtype: torch.dtype) -> None:
    gate, x = Fp32Gate(32, N, bias=False).to(dtype), torch.randn(3, 11, 32, dtype=dtype, requires_grad=True)
    exact, exact_x = copy.deepcopy(gate).double(), x.detach().double().requires_grad_()
    weight = torch.randn(3, 11, N)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        logits = gate(x)
    (logits * weight).sum().backward()
    (nn.Linear.forward(exact, exact_x) * weight.double()).sum().backward()
    assert logits.dtype == torch.float32
    assert distance(logits, nn.Linear.forward(exact, exact_x)) < 1e-6
    assert {tensor.dtype for tensor in saved} == {dtype}
    eps = torch.finfo(dtype).eps
    for ours, theirs in ((x.grad, exact_x.grad), (gate.weight.grad, exact.weight.grad)):
        assert ours.dtype == dtype
        assert distance(ours, theirs) < eps


def test_an_fp32_router_stays_in_fp32_under_autocast() -> None:
    block = make_block(num_experts_per_tok=2, router_dtype="fp32")
    x = torch.randn(7, 32)
    expected = block.router.gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = block.router.gate(x)
    assert torch.equal(logits, expected)
    assert logits.dtype == torch.float32


def test_router_dtype_does_not_change_an_fp32_model() -> None:
    results = []
    for router_dtype in ("model", "fp32"):
        torch.manual_seed(3)
        block, x = (
            make_block(num_experts_per_tok=2, router_dtype=router_dtype),
            torch.randn(2, 5, 32, requires_grad=True),
        )
        y = block(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_fp32_router_runs_on_the_meta_device() -> None:
    gate = Fp32Gate(32, N, bias=False, device="meta", dtype=torch.bfloat16)
    logits = gate(torch.empty(4, 32, device="meta", dtype=torch.bfloat16))
    assert (logits.shape, logits.dtype) == ((4, N), torch.float32)


def test_a_frozen_fp32_router_still_sends_a_gradient_to_its_input() -> None:
    gate, x = Fp32Gate(32, N, bias=False).bfloat16(), torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    expected = torch.autograd.grad(gate(x).square().sum(), x)[0]
    gate.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(gate(x).square().sum(), x)[0], expected)
