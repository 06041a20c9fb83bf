"""Test how the metrics of a validation are computed from the losses of its datasets."""

import math

import pytest

from hypermoe_ds.data.token_files import read_metadata
from hypermoe_ds.data.tokenizer import load_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.training.evaluation import Evaluation
from hypermoe_ds.training.validation import contribution_values, encode_prompt, validation_values
from tests.helpers.corpus import TokenisedCorpus, tokenised_corpus

WITH = {"a": Evaluation(2.0, 300), "b": Evaluation(3.0, 100)}
WITHOUT = {"a": Evaluation(2.5, 300), "b": Evaluation(2.9, 100)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenisedCorpus:
    return tokenised_corpus(tmp_path_factory.mktemp("corpus"), vocab_size=500)


def test_total_loss_is_per_token_and_total_bits_are_per_byte() -> None:
    values = validation_values(WITH, {"a": 4.0, "b": 2.5})
    bits = (2.0 * 300 + 3.0 * 100) / math.log(2)
    assert values == pytest.approx(
        {
            "valid_loss": 2.25,
            "valid_loss/a": 2.0,
            "valid_loss/b": 3.0,
            "valid_perplexity": math.exp(2.25),
            "valid_perplexity/a": math.exp(2),
            "valid_perplexity/b": math.exp(3),
            "valid_bits_per_byte": bits / (300 * 4 + 100 * 2.5),
            "valid_bits_per_byte/a": 2.0 * 300 / math.log(2) / (300 * 4),
            "valid_bits_per_byte/b": 3.0 * 100 / math.log(2) / (100 * 2.5),
        }
    )


def test_bits_per_byte_need_the_text_size_of_the_dataset() -> None:
    values = validation_values(WITH, {"a": 4.0})
    assert [key for key in values if key.startswith("valid_bits_per_byte")] == ["valid_bits_per_byte/a"]


def test_contribution_is_the_increase_of_the_loss_without_hyper_experts() -> None:
    assert contribution_values(validation_values(WITH, {}), WITHOUT) == pytest.approx(
        {
            "valid_loss_without_hyper_experts": 2.6,
            "valid_loss_without_hyper_experts/a": 2.5,
            "valid_loss_without_hyper_experts/b": 2.9,
            "hyper_expert_contribution": 0.35,
            "hyper_expert_contribution/a": 0.5,
            "hyper_expert_contribution/b": -0.1,
        }
    )


def test_bytes_per_token_match_the_encoded_text(corpus: TokenisedCorpus) -> None:
    metadata = read_metadata(corpus.valid)
    assert metadata is not None
    assert metadata.bytes_per_token == metadata.text_bytes / metadata.tokens
    assert 1 < metadata.bytes_per_token < 8


def test_empty_or_too_long_prompt_is_refused(corpus: TokenisedCorpus) -> None:
    tokenizer = load_tokenizer(str(corpus.tokenizer))
    ids = encode_prompt(tokenizer, "import os", 100)
    assert tokenizer.decode(ids) == "import os"
    assert encode_prompt(tokenizer, "import os", len(ids)) == ids
    with pytest.raises(UserError, match=r"evaluation\.prompts: '': has no tokens; give a text or remove it"):
        encode_prompt(tokenizer, "", 100)
    with pytest.raises(UserError, match=rf"has {len(ids)} tokens; with evaluation\.prompt_tokens, the model allows"):
        encode_prompt(tokenizer, "import os", len(ids) - 1)
