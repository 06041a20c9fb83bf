"""Text from `generate` does not depend on padding, caching or the decoding method's shortcuts."""

from typing import Any

import pytest
import torch
from model_references import PATHS, VARIANTS, build, distance, tokens
from torch import Tensor

NEW = {"max_new_tokens": 8, "pad_token_id": 0}
PROMPTS = (9, 4, 7)


def left_padded(prompts: list[Tensor], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts [1, S] on the left; return input_ids and attention_mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask


def untied_model(variant: str = "plain") -> Any:
    """Build a model with untied embeddings, because an untrained model with tied ones repeats a single token."""
    return build(**{**VARIANTS[variant], "tie_word_embeddings": False})


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_prompts_generate_the_same_as_each_prompt_alone(options: dict[str, Any], use_cache: bool) -> None:
    model, prompts = untied_model(), [tokens(1, length) for length in PROMPTS]
    ids, mask = left_padded(prompts)
    together = model.generate(ids, attention_mask=mask, use_cache=use_cache, **options, **NEW)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, use_cache=use_cache, **options, **NEW)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("variant", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=str,
)
def test_sampling_and_beam_search_do_not_depend_on_the_cache(variant: str, options: dict[str, Any]) -> None:
    model = untied_model(variant)
    ids, mask = left_padded([tokens(1, length) for length in PROMPTS])

    def generate(seed: int, **caching: Any) -> Tensor:
        torch.manual_seed(seed)
        text: Tensor = model.generate(ids, attention_mask=mask, **caching, **options, **NEW)
        return text

    plain = generate(1, use_cache=False)
    assert torch.equal(generate(1, use_cache=True), plain)
    assert torch.equal(generate(1, cache_implementation="static"), plain)
    if options["do_sample"]:
        assert not torch.equal(generate(2, use_cache=True), plain)


def test_assisted_decoding_does_not_change_the_text() -> None:
    model, ids = untied_model(), tokens(1, 6).repeat(1, 3)  # repeated n-grams produce drafts, some of which are wrong
    plain = model.generate(ids, do_sample=False, **NEW)
    assert torch.equal(model.generate(ids, do_sample=False, prompt_lookup_num_tokens=3, **NEW), plain)
    assert torch.equal(model.generate(ids, do_sample=False, assistant_model=build(seed=1), **NEW), plain)


@pytest.mark.parametrize("variant", PATHS)
def test_position_ids_are_derived_from_the_attention_mask(variant: str) -> None:
    model = untied_model(variant)
    prompts = [tokens(1, length) for length in PROMPTS]
    with torch.no_grad():
        for pad_id in (0, 5):
            ids, mask = left_padded(prompts, pad_id)
            together = model(input_ids=ids, attention_mask=mask).logits
            assert together.isfinite().all()
            for row, prompt in enumerate(prompts):
                alone = model(input_ids=prompt).logits
                assert distance(together[row, -prompt.shape[1] :], alone[0]) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree_on_padded_batches(attention: str) -> None:
    model = untied_model()
    ids, mask = left_padded([tokens(1, length) for length in PROMPTS])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation(attention)
        other = model(input_ids=ids, attention_mask=mask).logits
    assert distance(other[mask.bool()], expected[mask.bool()]) < 1e-5


def test_logits_to_keep_accepts_a_tensor_of_positions() -> None:
    model, ids = untied_model(), tokens(2, 8)
    with torch.no_grad():
        full = model(input_ids=ids).logits
        kept = torch.tensor([1, 5, 6])
        assert distance(model(input_ids=ids, logits_to_keep=kept).logits, full[:, kept]) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_losses_or_gradients(side: str) -> None:
    """The routing losses average over tokens, so they must exclude padding."""
    model, ids = untied_model(), tokens(1, 9)
    padding = torch.full((1, 5), 3)
    parts = [(padding, torch.zeros_like(padding), -100), (ids, torch.ones_like(ids), None)]
    parts = parts if side == "left" else parts[::-1]
    labels = [part if label is None else torch.full_like(part, label) for part, _, label in parts]

    def losses_and_gradient(**batch: Tensor) -> tuple[list[float], Tensor]:
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return [loss.item() for loss in (output.loss, output.lm_loss, output.aux_loss, output.z_loss)], gradient

    alone, expected = losses_and_gradient(input_ids=ids, labels=ids)
    padded, gradient = losses_and_gradient(
        input_ids=torch.cat([part for part, _, _ in parts], dim=1),
        attention_mask=torch.cat([mask for _, mask, _ in parts], dim=1),
        labels=torch.cat(labels, dim=1),
    )
    assert padded == pytest.approx(alone, rel=1e-5)
    assert distance(gradient, expected) < 1e-4


def test_early_exit_drafts_do_not_change_the_text() -> None:
    model, ids = build().eval(), tokens(1, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, assistant_early_exit=1, **settings), model.generate(ids, **settings))
