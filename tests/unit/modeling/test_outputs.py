"""The forward pass behaves as in Transformers: optional outputs, tuples, caches and attention functions."""

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
def test_hidden_states_are_the_layer_inputs_and_the_normalised_output(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 7)
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    output = model(input_ids=ids, output_hidden_states=True)
    *before, last = output.hidden_states
    assert len(before) == model.config.num_hidden_layers
    assert torch.equal(before[0], model.model.embed_tokens(ids))
    assert all(torch.equal(state, layer_input) for state, layer_input in zip(before, inputs, strict=True))
    assert torch.equal(model.lm_head(last), output.logits)

    decoded = model.model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(decoded.hidden_states[-1], decoded.last_hidden_state)
    assert model(input_ids=ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(input_ids=ids).hidden_states) == len(output.hidden_states)


def test_attention_weights_reproduce_the_attention_output() -> None:
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
        heads = value.view(2, 7, 2, 1, 8).expand(2, 7, 2, 2, 8).reshape(2, 7, 4, 8)  # two query heads per key head
        assert torch.allclose(torch.einsum("bhst,bthd->bshd", weights, heads).flatten(2), output, atol=1e-6)
    assert model(input_ids=ids).attentions is None
    model.set_attn_implementation("sdpa")
    assert model(input_ids=ids, output_attentions=True).attentions == ()  # as in Transformers, which also warns


def test_tuple_outputs_contain_loss_logits_and_the_requested_outputs_in_order() -> None:
    model, ids = build(), tokens(2, 7)
    full = model(input_ids=ids, labels=ids)
    loss, logits, cache, *_ = model(input_ids=ids, labels=ids, return_dict=False)
    assert torch.equal(loss, full.loss)
    assert torch.equal(logits, full.logits)
    assert isinstance(cache, DynamicCache)
    logits, states = model(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, full.logits)
    assert len(states) == 4
    model.config.return_dict = False
    assert torch.equal(model(input_ids=ids)[0], full.logits)
    assert isinstance(model.model(input_ids=ids), tuple)


@pytest.mark.parametrize("variant", ["plain", "top-1"])
def test_a_decoding_loop_gets_a_cache_without_setting_use_cache(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens(2, 7)
    with torch.no_grad():
        full = model(input_ids=ids).logits
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            output = model(input_ids=token, past_key_values=cache)
            cache = output.past_key_values
            steps.append(output.logits)
        assert distance(torch.cat(steps, dim=1), full) < 1e-5
        assert model(input_ids=ids, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(input_ids=ids).past_key_values is None
        assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 7


@pytest.mark.parametrize("checkpointing", [False, True])
def test_extra_arguments_reach_the_attention_function_of_every_layer(checkpointing: bool) -> None:
    model, ids = build(), tokens(1, 6)
    if checkpointing:
        model.train().activation_checkpointing_enable()
    expected = model(input_ids=ids).logits
    seen: list[dict[str, Any]] = []

    def probe(*arguments: Any, **keywords: Any) -> tuple[Tensor, None]:
        seen.append(keywords)
        output: tuple[Tensor, None] = sdpa_attention_forward(*arguments, **keywords)
        return output

    AttentionInterface.register("probe", probe)
    model.set_attn_implementation("probe")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])  # kernels without a mask find documents by positions
    model(input_ids=ids, cu_seq_lens_q="value")
    model(input_ids=ids, position_ids=positions)
    assert len(seen) == 2 * model.config.num_hidden_layers
    assert all(keywords["cu_seq_lens_q"] == "value" for keywords in seen[:3])
    assert all(torch.equal(keywords["position_ids"], positions) for keywords in seen[3:])
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention_gives_the_same_logits_as_sdpa(padded: bool) -> None:
    model, ids, mask = build(head_dim=16), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0 if padded else 1
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling the kernel takes over a minute
        expected = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        other = model(input_ids=ids, attention_mask=mask).logits
    assert not torch.equal(other, expected)
    assert distance(other[mask.bool()], expected[mask.bool()]) < 1e-5


def test_auto_classes_build_the_decoder_and_the_language_model() -> None:
    config = build(num_hidden_layers=1).config
    assert type(AutoModel.from_config(config)) is HyperMoEModel
    assert type(AutoModelForCausalLM.from_config(config)) is HyperMoEForCausalLM
    assert MODEL_MAPPING_NAMES["hypermoe"] == "HyperMoEModel"


def test_a_saved_model_lists_all_auto_classes_and_a_saved_config_only_its_own(tmp_path: Path) -> None:
    def auto_classes(folder: str) -> set[str]:
        return set(json.loads((tmp_path / folder / "config.json").read_text())["auto_map"])

    model = build()
    for _ in range(2):
        model.config.save_pretrained(tmp_path / "config")
        assert auto_classes("config") == {"AutoConfig"}
    for folder, part in (("causal_lm", model), ("decoder", build(seed=1).model)):
        part.save_pretrained(tmp_path / folder)
        assert auto_classes(folder) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        loaded = AutoModel.from_pretrained(tmp_path / folder)
        expected = part.get_decoder() if folder == "causal_lm" else part
        ids = tokens(1, 5)
        assert distance(loaded(ids).last_hidden_state, expected(ids).last_hidden_state) < 1e-6


def test_labels_is_the_only_label_parameter_of_the_forward_signature() -> None:
    """The Trainer reads label names from the signature and expects a column for each."""
    assert [name for name in inspect.signature(HyperMoEForCausalLM.forward).parameters if "label" in name] == ["labels"]
