import numpy as np
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

from hypermoe_ds.data.loader import mask_documents
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.attention import Attention, rotary_tables, rotate

VOCABULARY = SMALL["vocab_size"]


def gradients(model: HyperMoEForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_the_reference_implementation(variant: str) -> None:
    model = build(**VARIANTS[variant])
    ids = tokens(2, 10)
    seen = model(input_ids=ids).logits
    with torch.no_grad():
        exact = build(**VARIANTS[variant]).double()
        expected = torch.stack([logits(exact, row) for row in ids])
    assert expected.std() > 0.1
    assert distance(seen, expected) < 1e-5


def test_rotation_matches_complex_multiplication() -> None:
    x = torch.randn(2, 3, 7, 10)
    positions = torch.stack([torch.arange(7), torch.tensor([0, 0, 5, 1, 900, 31, 2])])
    seen = rotate(x, rotary_tables(positions, 10, 10000.0, torch.float32))
    for row in range(2):
        for head in range(3):
            for index in range(7):
                position = int(positions[row, index])
                expected = rotate_as_complex(x[row, head, index], position, 10000.0)
                # The tolerance is 2e-4 because an angle of 900 has a rounding error of 6e-5 in fp32.
                assert torch.allclose(seen[row, head, index], expected, atol=2e-4 if position > 50 else 1e-5)


def test_rotated_dot_products_depend_only_on_the_distance() -> None:
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def product(query_at: int, key_at: int) -> float:
        at = [rotary_tables(torch.tensor([[index]]), 16, 10000.0, torch.float64) for index in (query_at, key_at)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum().item()

    for shift in (1, 10, 300):
        assert product(9 + shift, 5 + shift) == pytest.approx(product(9, 5), abs=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


@pytest.mark.parametrize("variant", ["plain", "renormalised, qk-norm"])
def test_shifting_all_positions_does_not_change_the_logits(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 12)
    positions = torch.arange(12).unsqueeze(0)
    plain = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, position_ids=positions).logits, plain)
    assert distance(model(input_ids=ids, position_ids=positions + 100).logits, plain) < 1e-4
    assert distance(model(input_ids=ids, position_ids=2 * positions).logits, plain) > 1e-2


def test_grouped_query_attention_equals_repeated_key_and_value_heads() -> None:
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


def test_attention_is_causal() -> None:
    model, ids = build(), tokens(1, 12)
    other = ids.clone()
    other[0, 7:] = (ids[0, 7:] + 1) % VOCABULARY
    first, second = model(input_ids=ids).logits, model(input_ids=other).logits
    assert distance(second[:, :7], first[:, :7]) < 1e-6
    assert distance(second[:, 7:], first[:, 7:]) > 1e-2


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
        -log_probability[row, index, labels[row, index + 1]]
        for row in range(3)
        for index in range(11)
        if labels[row, index + 1] != -100
    ]
    assert len(terms) == (33 - 5 if ignored else 33)
    assert output.lm_loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.lm_loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_shifted_labels_give_the_same_loss_and_gradients() -> None:
    model, ids = build(), tokens(2, 12)
    first = model(input_ids=ids, labels=ids)
    first.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    second = model(input_ids=ids, shift_labels=shifted)
    second.loss.backward()
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(model).items())

    # If the label of the last position is known, the loss uses every position.
    following = tokens(2, 1)
    all_positions = model(input_ids=ids, shift_labels=torch.cat([ids[:, 1:], following], dim=1))
    wanted = F.cross_entropy(all_positions.logits.flatten(0, 1), torch.cat([ids[:, 1:], following], dim=1).flatten())
    assert all_positions.lm_loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("variant", ["plain", "top-1", "dense and shared", "no hypernetwork"])
def test_the_loss_includes_the_weighted_routing_losses_of_all_layers(variant: str) -> None:
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
def test_routing_losses_send_gradients_to_all_layers_below_a_router(variant: str) -> None:
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


def test_a_model_without_moe_layers_has_no_routing_losses() -> None:
    model, ids = build(first_dense_layers=3), tokens(2, 12)
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert torch.equal(output.loss, output.lm_loss)
    assert output.aux_loss is None
    assert not output.router_logits


def test_the_balance_loss_uses_loads_summed_over_ranks() -> None:
    model, ids = build(router_aux_loss_coef=0.3, z_loss_coef=0.0), tokens(2, 12)
    plain = model(input_ids=ids, labels=ids)
    other_ranks = torch.tensor([100.0, 0.0, 0.0, 0.0])
    calls: list[Tensor] = []

    def sum_over_ranks(counts: Tensor) -> Tensor:
        calls.append(counts)
        return counts + other_ranks

    model.sum_over_ranks = sum_over_ranks
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    expected = 0.0
    for scores, counts in zip(output.router_logits, calls, strict=True):
        share = (counts + other_ranks) / (counts + other_ranks).sum()
        expected += 4 * (share * torch.softmax(scores, -1).mean(0)).sum().item()
    assert [counts.sum().item() for counts in calls] == [48, 48, 48]
    assert output.aux_loss.item() == pytest.approx(expected / 3, rel=1e-5)
    assert output.aux_loss.item() != pytest.approx(plain.aux_loss.item(), rel=1e-2)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("variant", ["plain", "dense and shared", "no hypernetwork"])
def test_activation_checkpointing_gives_bitwise_identical_loss_and_gradients(
    variant: str, reentrant: bool | None
) -> None:
    model, ids = build(**VARIANTS[variant], router_aux_loss_coef=1.0).train(), tokens(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()

    options = {} if reentrant is None else {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model.activation_checkpointing_enable(**options)
    calls: list[int] = []
    layer = model.model.layers[0].self_attn
    layer.q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = model(input_ids=ids, labels=ids, output_router_logits=True)
    recomputed.loss.backward()
    assert len(calls) == 2, "the backward pass calls the layer a second time"
    assert torch.equal(recomputed.loss, loss)
    seen = gradients(model)
    assert all(torch.equal(seen[name], value) for name, value in expected.items())
    assert len(recomputed.router_logits) == len(model.config.moe_layers)


@pytest.mark.parametrize("variant", PATHS)
def test_every_parameter_receives_a_gradient(variant: str) -> None:
    torch.manual_seed(3)
    model = HyperMoEForCausalLM(HyperMoEConfig(**{**SMALL, **VARIANTS[variant]})).train()  # with initial weights
    ids = tokens(8, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert torch.isfinite(parameter.grad).all(), name
        if ".experts." in name:
            assert all(gradient.any() for gradient in parameter.grad), name


@pytest.mark.parametrize("variant", ["plain", "top-1", "dense and shared"])
def test_a_bfloat16_model_has_about_the_loss_of_fp32_and_finite_gradients(variant: str) -> None:
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
def test_under_autocast_the_loss_is_within_5_percent_of_fp32(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 12)
    exact = model(input_ids=ids, labels=ids).lm_loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).lm_loss
    assert loss.item() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("variant", PATHS)
def test_greedy_generation_is_the_same_with_and_without_a_cache(variant: str) -> None:
    # The embeddings are untied, because an untrained model with tied embeddings repeats a single token.
    model, ids = build(**{**VARIANTS[variant], "tie_word_embeddings": False}), tokens(2, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    plain = model.generate(ids, use_cache=False, **options)
    assert cached.shape == (2, 18)
    assert torch.equal(cached, plain)
    with torch.no_grad():
        best = model(input_ids=plain).logits.argmax(-1)
    assert torch.equal(plain[:, 6:], best[:, 5:-1])
    assert len(plain[:, 6:].unique()) > 2


@pytest.mark.parametrize("steps", [[1] * 14, [5, 1, 1, 7], [13, 1]], ids=str)
@pytest.mark.parametrize("variant", PATHS)
def test_decoding_in_chunks_gives_the_logits_of_the_full_sequence(variant: str, steps: list[int]) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 14)
    with torch.no_grad():
        full = model(input_ids=ids).logits
        cache, parts = None, []
        for chunk in ids.split(steps, dim=1):
            output = model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert cache.get_seq_length() == 14
    assert distance(torch.cat(parts, dim=1), full) < 1e-5


@pytest.mark.parametrize("variant", PATHS)
def test_left_padding_does_not_change_logits(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert distance(batch[0], model(input_ids=ids[:1]).logits[0]) < 1e-5
        assert distance(batch[1, 4:], model(input_ids=ids[1:, 4:]).logits[0]) < 1e-5
        unmasked = model(input_ids=ids).logits
    assert distance(batch[1, 4:], unmasked[1, 4:]) > 1e-2, "without the mask, padding changes the logits"


def test_prompts_of_different_lengths_generate_the_same_in_a_batch_and_alone() -> None:
    model, ids = build(tie_word_embeddings=False), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together[0, 9:], model.generate(ids[:1], **options)[0, 9:])
    assert torch.equal(together[1, 9:], model.generate(ids[1:, 5:], **options)[0, 4:])


def test_input_ids_and_inputs_embeds_are_equivalent_and_mutually_exclusive() -> None:
    model, ids = build(), tokens(2, 8)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=model.model.embed_tokens(ids))


def test_logits_to_keep_returns_the_last_logits() -> None:
    model, ids = build(), tokens(2, 8)
    full = model(input_ids=ids).logits
    assert full.shape == (2, 8, VOCABULARY)
    for kept in (1, 3, 8):
        assert distance(model(input_ids=ids, logits_to_keep=kept).logits, full[:, -kept:]) < 1e-6


@pytest.mark.parametrize("variant", PATHS)
def test_routing_is_returned_on_request_for_every_moe_layer(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(3, 7)
    config = model.config
    output = model(input_ids=ids, output_router_logits=True)
    layers, N, K = len(config.moe_layers), config.num_experts, config.num_experts_per_tok
    assert [tuple(scores.shape) for scores in output.router_logits] == [(21, N)] * layers
    assert [tuple(selected.shape) for selected in output.selected_experts] == [(21, K)] * layers
    for scores, selected in zip(output.router_logits, output.selected_experts, strict=True):
        assert torch.equal(selected.sort(-1).values, scores.topk(K).indices.sort(-1).values)
    if config.hypernetwork:
        assert [tuple(norms.shape) for norms in output.hyper_expert_norms] == [(2,)] * layers
    else:
        assert output.hyper_expert_norms is None

    silent = model(input_ids=ids, labels=ids)
    assert silent.router_logits is silent.selected_experts is silent.hyper_expert_norms is None


def test_branch_norms_are_norms_of_experts_and_hyper_experts() -> None:
    model, ids = build(), tokens(2, 7)
    seen: list[list[Tensor]] = []
    for layer in model.model.layers:
        pair: list[Tensor] = []
        seen.append(pair)
        layer.mlp.register_forward_hook(lambda _module, _inputs, output, pair=pair: pair.insert(0, output))
        layer.hyper_experts.register_forward_hook(lambda _module, _inputs, output, pair=pair: pair.append(output))
    norms = model(input_ids=ids, output_router_logits=True).hyper_expert_norms
    for layer_norms, pair in zip(norms, seen, strict=True):
        assert layer_norms.tolist() == pytest.approx([part.norm().item() for part in pair], rel=1e-5)


@pytest.mark.parametrize("variant", ["plain", "dense and shared"])
def test_without_hyper_experts_the_model_is_a_plain_mixture_of_experts(variant: str) -> None:
    model = build(**VARIANTS[variant])
    plain = build(seed=1, **VARIANTS[variant], hypernetwork=False)
    shared = {name: value for name, value in model.state_dict().items() if "hyper" not in name}
    assert len(shared) < len(model.state_dict())
    plain.load_state_dict(shared)
    ids = tokens(2, 12)
    with_hyper_experts = model(input_ids=ids, labels=ids)
    expected = plain(input_ids=ids, labels=ids)
    assert distance(with_hyper_experts.logits, expected.logits) > 1e-2
    hypernetwork = model.model.hypernetwork
    with torch.no_grad():
        for head in (hypernetwork.up_weight, hypernetwork.up_bias):
            head.weight.zero_()
            head.bias.zero_()
    without = model(input_ids=ids, labels=ids)
    assert torch.equal(without.logits, expected.logits)
    assert torch.equal(without.loss, expected.loss)


def test_projections_into_the_residual_stream_are_initialised_smaller() -> None:
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


def test_equal_seeds_give_equal_models_and_different_seeds_do_not() -> None:
    first, same, other = build(seed=5), build(seed=5), build(seed=6)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if "norm" not in name:
            assert not torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["plain", "renormalised, qk-norm"])
def test_losses_and_gradients_of_packed_documents_equal_those_of_the_documents_alone(
    variant: str, attention: str
) -> None:
    model = build(**VARIANTS[variant], router_aux_loss_coef=0, z_loss_coef=0)
    model.set_attn_implementation(attention)
    end, lengths = 1, [5, 1, 9, 3, 6]
    documents = [
        torch.cat([torch.randint(2, VOCABULARY, (1, length - 1)), torch.tensor([[end]])], 1) for length in lengths
    ]
    packed = torch.cat(documents, 1)
    labels = np.concatenate([packed[:, 1:].numpy(), [[7]]], 1)  # the sample ends within the last document
    labels, positions = mask_documents(packed.numpy(), labels, end)
    assert positions.tolist() == [[position for length in lengths for position in range(length)]]
    inputs = {"position_ids": torch.from_numpy(positions), "shift_labels": torch.from_numpy(labels)}
    together = model(input_ids=packed, use_cache=False, **inputs)
    together.loss.backward()
    packed_gradients = gradients(model)
    model.zero_grad()
    alone = [model(input_ids=document) for document in documents]
    logits = torch.cat([output.logits for output in alone], 1)
    assert distance(together.logits, logits) < 1e-5
    loss_sum = sum(
        F.cross_entropy(output.logits[0, :-1], document[0, 1:], reduction="sum")
        for output, document in zip(alone, documents, strict=True)
    )
    loss = loss_sum / sum(length - 1 for length in lengths)
    loss.backward()
    assert together.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert distance(packed_gradients[name], parameter.grad) < 1e-4, name
