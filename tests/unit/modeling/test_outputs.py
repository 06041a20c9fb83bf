"""What Transformers' users expect of a forward pass: outputs on request, tuples, caches and attention functions."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_references import PATHS, VARIANTS, build, distance, tokens
from torch import Tensor
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hypermoe_ds.modeling import HyperMoEForCausalLM
from hypermoe_ds.modeling.modeling_hypermoe import HyperMoEModel


@pytest.mark.parametrize("variant", PATHS)
def test_hidden_states_are_the_input_of_each_layer_and_the_output_after_the_final_norm(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 7)
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    output = model(input_ids=ids, output_hidden_states=True)
    *before, last = output.hidden_states
    assert len(before) == model.config.num_hidden_layers
    assert torch.equal(before[0], model.model.embed_tokens(ids))
    assert all(torch.equal(state, given) for state, given in zip(before, inputs, strict=True))
    assert torch.equal(model.lm_head(last), output.logits)

    decoded = model.model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(decoded.hidden_states[-1], decoded.last_hidden_state)
    assert model(input_ids=ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(input_ids=ids).hidden_states) == len(output.hidden_states)


def test_attention_weights_are_those_that_weigh_the_values() -> None:
    model, ids = build(), tokens(2, 7)
    model.set_attn_implementation("eager")
    values, outputs = [], []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _module, _inputs, output: values.append(output))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, arguments: outputs.append(arguments[0]))
    attentions = model(input_ids=ids, output_attentions=True).attentions
    assert len(attentions) == model.config.num_hidden_layers
    for weights, value, output in zip(attentions, values, outputs, strict=True):
        assert weights.shape == (2, 4, 7, 7)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 7))
        assert not weights.triu(1).any()
        heads = value.view(2, 7, 2, 1, 8).expand(2, 7, 2, 2, 8).reshape(2, 7, 4, 8)  # two queries a key
        assert torch.allclose(torch.einsum("bhst,bthd->bshd", weights, heads).flatten(2), output, atol=1e-6)
    assert model(input_ids=ids).attentions is None
    model.set_attn_implementation("sdpa")
    assert model(input_ids=ids, output_attentions=True).attentions == ()  # as in Transformers, which warns


def test_a_tuple_holds_the_loss_if_any_the_logits_and_what_else_was_asked_for() -> None:
    model, ids = build(), tokens(2, 7)
    whole = model(input_ids=ids, labels=ids)
    loss, logits, cache, *_ = model(input_ids=ids, labels=ids, return_dict=False)
    assert torch.equal(loss, whole.loss)
    assert torch.equal(logits, whole.logits)
    assert isinstance(cache, DynamicCache)
    logits, states = model(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, whole.logits)
    assert len(states) == 4
    model.config.return_dict = False
    assert torch.equal(model(input_ids=ids)[0], whole.logits)
    assert isinstance(model.model(input_ids=ids), tuple)


@pytest.mark.parametrize("variant", ["plain", "top-1"])
def test_a_loop_that_hands_the_cache_on_keeps_its_context_without_asking_for_a_cache(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 7)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            output = model(input_ids=token, past_key_values=cache)
            cache = output.past_key_values
            steps.append(output.logits)
        assert distance(torch.cat(steps, dim=1), whole) < 1e-5
        assert model(input_ids=ids, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(input_ids=ids).past_key_values is None
        assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 7


@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_arguments_reach_the_attention_function_of_every_layer(checkpointing: bool) -> None:
    model, ids = build(), tokens(1, 6)
    if checkpointing:
        model.train().activation_checkpointing_enable()
    expected = model(input_ids=ids).logits
    seen: list[dict[str, Any]] = []

    def probe(*arguments: Any, **named: Any) -> tuple[Tensor, None]:
        seen.append(named)
        output: tuple[Tensor, None] = sdpa_attention_forward(*arguments, **named)
        return output

    AttentionInterface.register("probe", probe)
    model.set_attn_implementation("probe")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])  # kernels without a mask separate packed documents by these
    model(input_ids=ids, cu_seq_lens_q="told")
    model(input_ids=ids, position_ids=positions)
    assert len(seen) == 2 * model.config.num_hidden_layers
    assert all(named["cu_seq_lens_q"] == "told" for named in seen[:3])
    assert all(torch.equal(named["position_ids"], positions) for named in seen[3:])
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention_gives_the_logits_of_scaled_dot_products(padded: bool) -> None:
    model, ids, mask = build(head_dim=16), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0 if padded else 1
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling its kernel takes over a minute
        expected = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        other = model(input_ids=ids, attention_mask=mask).logits
    assert not torch.equal(other, expected)
    assert distance(other[mask.bool()], expected[mask.bool()]) < 1e-5


def test_the_auto_classes_build_the_decoder_and_the_language_model() -> None:
    config = build(num_hidden_layers=1).config
    assert type(AutoModel.from_config(config)) is HyperMoEModel
    assert type(AutoModelForCausalLM.from_config(config)) is HyperMoEForCausalLM
    assert MODEL_MAPPING_NAMES["hypermoe"] == "HyperMoEModel"


def test_a_saved_model_lists_all_its_classes_and_a_configuration_alone_only_itself(tmp_path: Path) -> None:
    def listed(folder: str) -> set[str]:
        return set(json.loads((tmp_path / folder / "config.json").read_text())["auto_map"])

    model = build()
    for _ in range(2):
        model.config.save_pretrained(tmp_path / "config")
        assert listed("config") == {"AutoConfig"}
    for folder, part in (("whole", model), ("decoder", build(seed=1).model)):
        part.save_pretrained(tmp_path / folder)
        assert listed(folder) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        loaded = AutoModel.from_pretrained(tmp_path / folder)
        expected = part.get_decoder() if folder == "whole" else part
        ids = tokens(1, 5)
        assert distance(loaded(ids).last_hidden_state, expected(ids).last_hidden_state) < 1e-6


def test_only_the_unshifted_labels_are_a_parameter_that_a_dataset_has_to_hold() -> None:
    assert [name for name in inspect.signature(HyperMoEForCausalLM.forward).parameters if "label" in name] == ["labels"]
