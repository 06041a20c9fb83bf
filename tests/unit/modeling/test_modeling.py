import pytest
import torch
from model_references import (
    PATHS,
    SMALL,
    VARIANTS,
    build,
    distance,
    logits,
    rotate_as_complex,
    switch_loss,
    tokens,
    z_loss,
)
from torch import Tensor
from torch.nn import functional as F

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.attention import Attention, rotary_tables, rotate

VOCABULARY = SMALL["vocab_size"]


def gradients(model: HyperMoEForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_decoder_is_its_equations_written_out(variant: str) -> None:
    model = build(**VARIANTS[variant])
    ids = tokens(2, 10)
    seen = model(input_ids=ids).logits
    with torch.no_grad():
        exact = build(**VARIANTS[variant]).double()
        expected = torch.stack([logits(exact, row) for row in ids])
    assert expected.std() > 0.1
    assert distance(seen, expected) < 1e-5


def test_rotation_is_that_of_complex_numbers() -> None:
    x = torch.randn(2, 3, 7, 10)
    positions = torch.stack([torch.arange(7), torch.tensor([0, 0, 5, 1, 900, 31, 2])])
    seen = rotate(x, rotary_tables(positions, 10, 10000.0, torch.float32))
    for row in range(2):
        for head in range(3):
            for place in range(7):
                position = int(positions[row, place])
                expected = rotate_as_complex(x[row, head, place], position, 10000.0)
                # An angle of 900 is exact to 6e-5 in fp32.
                assert torch.allclose(seen[row, head, place], expected, atol=2e-4 if position > 50 else 1e-5)


def test_a_rotated_product_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def product(query_at: int, key_at: int) -> float:
        at = [rotary_tables(torch.tensor([[place]]), 16, 10000.0, torch.float64) for place in (query_at, key_at)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum().item()

    for far in (1, 10, 300):
        assert product(9 + far, 5 + far) == pytest.approx(product(9, 5), abs=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


@pytest.mark.parametrize("variant", ["plain", "renormalised, qk-norm"])
def test_logits_do_not_change_when_all_positions_are_shifted(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 12)
    positions = torch.arange(12).unsqueeze(0)
    plain = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, position_ids=positions).logits, plain)
    assert distance(model(input_ids=ids, position_ids=positions + 100).logits, plain) < 1e-4
    assert distance(model(input_ids=ids, position_ids=2 * positions).logits, plain) > 1e-2


def test_grouped_queries_are_repeated_heads() -> None:
    config = HyperMoEConfig(**SMALL, _attn_implementation="sdpa")
    wide_config = HyperMoEConfig(**{**SMALL, "num_key_value_heads": 4}, _attn_implementation="sdpa")
    grouped, repeated = Attention(config, 0), Attention(wide_config, 0)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32)
    repeated.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    rotary = rotary_tables(torch.arange(9).unsqueeze(0), 8, 10000.0, torch.float32)
    assert torch.allclose(grouped(x, rotary, None, None)[0], repeated(x, rotary, None, None)[0], atol=1e-6)


def test_no_token_sees_a_later_one() -> None:
    model, ids = build(), tokens(1, 12)
    other = ids.clone()
    other[0, 7:] = (ids[0, 7:] + 1) % VOCABULARY
    one, two = model(input_ids=ids).logits, model(input_ids=other).logits
    assert distance(two[:, :7], one[:, :7]) < 1e-6
    assert distance(two[:, 7:], one[:, 7:]) > 1e-2


@pytest.mark.parametrize("ignored", [False, True])
def test_the_language_loss_is_the_cross_entropy_of_the_next_token(ignored: bool) -> None:
    model, ids = build(), tokens(3, 12)
    labels = ids.clone()
    if ignored:
        labels[0, :5] = -100
        labels[2, -1] = -100
    output = model(input_ids=ids, labels=labels)
    log_probability = torch.log_softmax(output.logits.double(), dim=-1)
    terms = [
        -log_probability[row, place, labels[row, place + 1]]
        for row in range(3)
        for place in range(11)
        if labels[row, place + 1] != -100
    ]
    assert len(terms) == (33 - 5 if ignored else 33)
    assert output.lm_loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.lm_loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_labels_that_are_already_shifted_give_the_same_loss_and_gradients() -> None:
    model, ids = build(), tokens(2, 12)
    one = model(input_ids=ids, labels=ids)
    one.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    two = model(input_ids=ids, shift_labels=shifted)
    two.loss.backward()
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(model).items())

    # A window that knows the token after its last one uses every position.
    following = tokens(2, 1)
    all_places = model(input_ids=ids, shift_labels=torch.cat([ids[:, 1:], following], dim=1))
    wanted = F.cross_entropy(all_places.logits.flatten(0, 1), torch.cat([ids[:, 1:], following], dim=1).flatten())
    assert all_places.lm_loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("variant", ["plain", "top-1", "dense and shared", "no hypernetwork"])
def test_the_loss_adds_each_layers_routing_losses_with_their_weights(variant: str) -> None:
    model = build(**VARIANTS[variant], router_aux_loss_coef=0.3, z_loss_coef=0.07)
    ids = tokens(2, 12)
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    layers = [
        (switch_loss(scores.double(), selected).item(), z_loss(scores.double()).item())
        for scores, selected in zip(output.router_logits, output.selected_experts, strict=True)
    ]
    assert len(layers) == len(model.config.moe_layers) > 1
    balance, squares = (sum(terms) for terms in zip(*layers, strict=True))
    assert output.aux_loss.item() == pytest.approx(balance / len(layers), rel=1e-5)
    assert output.z_loss.item() == pytest.approx(squares / len(layers), rel=1e-5)
    expected = output.lm_loss.item() + 0.3 * balance + 0.07 * squares
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("variant", ["top-1", "dense and shared"])
def test_the_routing_losses_gradient_reaches_every_layer_below_a_router(variant: str) -> None:
    model = build(**VARIANTS[variant], router_aux_loss_coef=0.3, z_loss_coef=0.07)
    ids, scores = tokens(2, 12), []
    for layer in model.model.layers:
        if layer.is_moe:
            layer.mlp.router.gate.register_forward_hook(lambda _module, _inputs, output: scores.append(output))
    output = model(input_ids=ids, labels=ids)
    added = output.loss - output.lm_loss
    top_k = model.config.num_experts_per_tok
    expected = sum(0.3 * switch_loss(score, score.topk(top_k).indices) + 0.07 * z_loss(score) for score in scores)
    names, parameters = zip(*model.named_parameters(), strict=True)
    seen, wanted = (
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in (added, expected)
    )
    for name, gradient, reference in zip(names, seen, wanted, strict=True):
        assert distance(gradient, reference) < 1e-4, name
        if "embed_tokens" in name or "router" in name:
            assert gradient.any(), name


def test_a_model_without_sparse_layers_has_no_routing_losses() -> None:
    model, ids = build(first_dense_layers=3), tokens(2, 12)
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert torch.equal(output.loss, output.lm_loss)
    assert output.aux_loss is None
    assert not output.router_logits


def test_routing_losses_count_loads_with_the_sum_over_ranks_of_the_model() -> None:
    model, ids = build(router_aux_loss_coef=0.3, z_loss_coef=0.0), tokens(2, 12)
    plain = model(input_ids=ids, labels=ids)
    elsewhere = torch.tensor([100.0, 0.0, 0.0, 0.0])
    calls: list[Tensor] = []

    def sum_over_ranks(counts: Tensor) -> Tensor:
        calls.append(counts)
        return counts + elsewhere

    model.sum_over_ranks = sum_over_ranks
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    expected = 0.0
    for scores, counts in zip(output.router_logits, calls, strict=True):
        share = (counts + elsewhere) / (counts + elsewhere).sum()
        expected += 4 * (share * torch.softmax(scores, -1).mean(0)).sum().item()
    assert [counts.sum().item() for counts in calls] == [48, 48, 48]
    assert output.aux_loss.item() == pytest.approx(expected / 3, rel=1e-5)
    assert output.aux_loss.item() != pytest.approx(plain.aux_loss.item(), rel=1e-2)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("variant", ["plain", "dense and shared", "no hypernetwork"])
def test_activation_checkpointing_does_not_change_a_bit_of_loss_or_gradients(
    variant: str, reentrant: bool | None
) -> None:
    model, ids = build(**VARIANTS[variant], router_aux_loss_coef=1.0).train(), tokens(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()

    arguments = {} if reentrant is None else {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model.activation_checkpointing_enable(**arguments)
    runs: list[int] = []
    layer = model.model.layers[0].self_attn
    layer.q_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    again = model(input_ids=ids, labels=ids, output_router_logits=True)
    again.loss.backward()
    assert len(runs) == 2, "the layer was run again in backward"
    assert torch.equal(again.loss, loss)
    seen = gradients(model)
    assert all(torch.equal(seen[name], value) for name, value in expected.items())
    assert len(again.router_logits) == len(model.config.moe_layers)


@pytest.mark.parametrize("variant", PATHS)
def test_every_parameter_receives_a_gradient(variant: str) -> None:
    torch.manual_seed(3)
    model = HyperMoEForCausalLM(HyperMoEConfig(**{**SMALL, **VARIANTS[variant]})).train()  # as it starts
    ids = tokens(8, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert torch.isfinite(parameter.grad).all(), name
        if ".experts." in name:
            assert all(gradient.any() for gradient in parameter.grad), name


@pytest.mark.parametrize("variant", ["plain", "top-1", "dense and shared"])
def test_a_bfloat16_model_runs_forward_and_backward_near_the_fp32_one(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 12)
    exact = model(input_ids=ids, labels=ids).lm_loss.item()
    model.to(torch.bfloat16)
    output = model(input_ids=ids, labels=ids)
    assert output.logits.dtype is torch.bfloat16
    assert output.loss.dtype is torch.float32
    assert output.lm_loss.item() == pytest.approx(exact, rel=0.05)
    output.loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("variant", ["plain", "top-1", "dense and shared"])
def test_under_autocast_the_loss_is_that_of_fp32_within_rounding(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 12)
    exact = model(input_ids=ids, labels=ids).lm_loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).lm_loss
    assert loss.item() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("variant", PATHS)
def test_greedy_generation_is_the_same_with_and_without_a_cache(variant: str) -> None:
    # Tied embeddings of an untrained model would repeat one token for ever.
    model, ids = build(**{**VARIANTS[variant], "tie_word_embeddings": False}), tokens(2, 6)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **arguments)
    plain = model.generate(ids, use_cache=False, **arguments)
    assert cached.shape == (2, 18)
    assert torch.equal(cached, plain)
    with torch.no_grad():
        best = model(input_ids=plain).logits.argmax(-1)
    assert torch.equal(plain[:, 6:], best[:, 5:-1])
    assert len(plain[:, 6:].unique()) > 2


@pytest.mark.parametrize("steps", [[1] * 14, [5, 1, 1, 7], [13, 1]], ids=str)
@pytest.mark.parametrize("variant", PATHS)
def test_decoding_step_by_step_gives_the_logits_of_the_whole_sequence(variant: str, steps: list[int]) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 14)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache, parts = None, []
        for chunk in ids.split(steps, dim=1):
            output = model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert cache.get_seq_length() == 14
    assert distance(torch.cat(parts, dim=1), whole) < 1e-5


@pytest.mark.parametrize("variant", PATHS)
def test_padding_on_the_left_does_not_change_the_logits_of_the_tokens(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert distance(batch[0], model(input_ids=ids[:1]).logits[0]) < 1e-5
        assert distance(batch[1, 4:], model(input_ids=ids[1:, 4:]).logits[0]) < 1e-5
        unmasked = model(input_ids=ids).logits
    assert distance(batch[1, 4:], unmasked[1, 4:]) > 1e-2, "what the padding holds would matter without its mask"


def test_prompts_of_different_lengths_generate_together_what_they_generate_alone() -> None:
    model, ids = build(tie_word_embeddings=False), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **arguments)
    assert torch.equal(together[0, 9:], model.generate(ids[:1], **arguments)[0, 9:])
    assert torch.equal(together[1, 9:], model.generate(ids[1:, 5:], **arguments)[0, 4:])


def test_embeddings_in_the_place_of_ids_give_the_same_logits_and_only_one_of_them_is_taken() -> None:
    model, ids = build(), tokens(2, 8)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=model.model.embed_tokens(ids))


def test_logits_to_keep_are_the_last_ones() -> None:
    model, ids = build(), tokens(2, 8)
    whole = model(input_ids=ids).logits
    assert whole.shape == (2, 8, VOCABULARY)
    for kept in (1, 3, 8):
        assert distance(model(input_ids=ids, logits_to_keep=kept).logits, whole[:, -kept:]) < 1e-6


@pytest.mark.parametrize("variant", PATHS)
def test_routing_is_returned_on_request_one_per_sparse_layer(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(3, 7)
    config = model.config
    output = model(input_ids=ids, output_router_logits=True)
    layers, N, K = len(config.moe_layers), config.num_experts, config.num_experts_per_tok
    assert [tuple(scores.shape) for scores in output.router_logits] == [(21, N)] * layers
    assert [tuple(selected.shape) for selected in output.selected_experts] == [(21, K)] * layers
    for scores, selected in zip(output.router_logits, output.selected_experts, strict=True):
        assert torch.equal(selected.sort(-1).values, scores.topk(K).indices.sort(-1).values)
    if config.hypernetwork:
        assert [tuple(norms.shape) for norms in output.branch_norms] == [(2,)] * layers
    else:
        assert output.branch_norms is None

    silent = model(input_ids=ids, labels=ids)
    assert silent.router_logits is silent.selected_experts is silent.branch_norms is None


def test_branch_norms_are_those_of_the_two_branches() -> None:
    model, ids = build(), tokens(2, 7)
    seen: list[list[Tensor]] = []
    for layer in model.model.layers:
        pair: list[Tensor] = []
        seen.append(pair)
        layer.mlp.register_forward_hook(lambda _module, _inputs, output, pair=pair: pair.insert(0, output))
        layer.hyper_experts.register_forward_hook(lambda _module, _inputs, output, pair=pair: pair.append(output))
    norms = model(input_ids=ids, output_router_logits=True).branch_norms
    for layer_norms, pair in zip(norms, seen, strict=True):
        assert layer_norms.tolist() == pytest.approx([part.norm().item() for part in pair], rel=1e-5)


@pytest.mark.parametrize("variant", ["plain", "dense and shared"])
def test_without_the_hypernetwork_the_model_is_the_plain_mixture_of_experts(variant: str) -> None:
    model = build(**VARIANTS[variant])
    plain = build(seed=1, **VARIANTS[variant], hypernetwork=False)
    shared = {name: value for name, value in model.state_dict().items() if "hyper" not in name}
    assert len(shared) < len(model.state_dict())
    plain.load_state_dict(shared)
    ids = tokens(2, 12)
    with_branch = model(input_ids=ids, labels=ids)
    expected = plain(input_ids=ids, labels=ids)
    assert distance(with_branch.logits, expected.logits) > 1e-2
    hypernetwork = model.model.hypernetwork
    with torch.no_grad():
        for head in (hypernetwork.up_weight, hypernetwork.up_bias):
            head.weight.zero_()
            head.bias.zero_()
    without = model(input_ids=ids, labels=ids)
    assert torch.equal(without.logits, expected.logits)
    assert torch.equal(without.loss, expected.loss)


def test_weights_that_write_to_the_residual_stream_start_smaller() -> None:
    model = HyperMoEForCausalLM(HyperMoEConfig(**{**SMALL, "hidden_size": 64, "first_dense_layers": 1}))
    std = 0.02
    residual_std = std / (2 * 3) ** 0.5
    expected = {"o_proj": residual_std, "down_proj": residual_std, "embed_tokens": std, "router.gate": std}
    expected |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", ".up_proj", "gate_up_proj"), std)
    checked = set()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        for part, deviation in expected.items():
            if part in name and "hyper" not in name:
                assert parameter.std().item() == pytest.approx(deviation, rel=0.15), name
                assert abs(parameter.mean().item()) < 0.1 * std + 0.1 * deviation
                checked.add(part)
    assert checked == set(expected)


def test_equal_seeds_give_equal_models_and_others_do_not() -> None:
    one, same, other = build(seed=5), build(seed=5), build(seed=6)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if "norm" not in name:
            assert not torch.equal(parameter, other.get_parameter(name)), name
