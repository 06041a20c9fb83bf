"""Encoding a document in windows yields the same token ids as encoding the whole document, even for difficult text."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from hypermoe_ds.data.long_documents import LongEncoder
from hypermoe_ds.data.tokenizer import load_tokenizer
from tests.helpers.corpus import TokenisedCorpus, stdlib_texts

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
DIFFICULT = [
    "a" * 400, " " * 300, "1234567890" * 40, "\n" * 200, "漢字かな交じり" * 20, "🙂👨‍👩‍👧" * 30, "e\u0301" * 50,
    "</s> <s>", "\u00a0\u3000" * 20, "\t" * 99, "x1 y22 z333 ", "ﬁﬀ①" * 20, "don't we'll ", "\r\n" * 30,
    "العربية " * 10, "\u200d\ufeff" * 10, "İıſß" * 10,
]  # fmt: skip
WINDOW, OVERLAP = 3000, 512


def byte_level(text: list[str], pattern: str | None = None) -> Tokenizer:
    """Train a byte-level BPE tokenizer like GPT-2's, or like Llama 3's if `pattern` splits the text into words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*text, *DIFFICULT], trainer)
    return tokenizer


def unigram(text: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=1000, show_progress=False, unk_token="<unk>")
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def word_piece(text: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1000, show_progress=False, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def with_added_tokens(text: list[str]) -> Tokenizer:
    """Return a tokenizer that encodes runs of spaces as one token, like the tokenizers of code models."""
    tokenizer = byte_level(text)
    tokenizer.add_tokens([*(" " * n for n in range(2, 25)), "aaa", "<tab>"])
    return tokenizer


MAKE: dict[str, Callable[[list[str]], Tokenizer]] = {
    "gpt2": byte_level,
    "llama3": lambda text: byte_level(text, LLAMA_3),
    "unigram": unigram,
    "word_piece": word_piece,
    "added_tokens": with_added_tokens,
}


@pytest.fixture(scope="module")
def tokenizers(corpus: TokenisedCorpus) -> dict[str, Tokenizer]:
    text = [path.read_text(encoding="utf-8") for path in stdlib_texts(4)]
    made = {name: make(text) for name, make in MAKE.items()}
    made["sentencepiece"] = load_tokenizer(corpus.tokenizer).backend_tokenizer
    made["llama2"] = Tokenizer.from_str(made["sentencepiece"].to_str())
    made["llama2"].pre_tokenizer = None
    made["llama2"].normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for tokenizer in made.values():
        tokenizer.encode_special_tokens = True
    return made


NAMES = [*MAKE, "sentencepiece", "llama2"]


def assert_equal_to_one_pass(tokenizer: Tokenizer, text: str, window: int = WINDOW, piece: int = 777) -> None:
    encoder = LongEncoder(tokenizer, window, OVERLAP)
    pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
    ids = np.concatenate([np.empty(0, dtype=np.int64), *encoder.encode(pieces)])
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", NAMES)
def test_windows_of_real_text_have_the_ids_of_one_pass(tokenizers: dict[str, Tokenizer], name: str) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in stdlib_texts(8))
    assert_equal_to_one_pass(tokenizers[name], text[:200_000])
    assert_equal_to_one_pass(tokenizers[name], text[: 10 * WINDOW])
    assert_equal_to_one_pass(tokenizers[name], text[: WINDOW - 1])
    assert_equal_to_one_pass(tokenizers[name], "")


@pytest.mark.parametrize("text", ["a", " ", "1234567890", "漢字仮名", "🙂", "ab \n1", "\u00e9"])
@pytest.mark.parametrize("name", NAMES)
def test_runs_without_word_boundaries_have_the_ids_of_one_pass(
    tokenizers: dict[str, Tokenizer], name: str, text: str
) -> None:
    assert_equal_to_one_pass(tokenizers[name], text * (20_000 // len(text)))
    random.seed(0)
    assert_equal_to_one_pass(tokenizers[name], "".join(random.choice(text) for _ in range(20_000)))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.one_of(st.sampled_from(DIFFICULT), st.text(max_size=200)), max_size=60),
    window=st.integers(600, 4000),
)
def test_difficult_text_has_the_ids_of_one_pass(
    tokenizers: dict[str, Tokenizer], name: str, parts: list[str], window: int
) -> None:
    assert_equal_to_one_pass(tokenizers[name], "".join(parts), window)


def test_memory_is_bounded_if_every_window_has_a_boundary(tokenizers: dict[str, Tokenizer]) -> None:
    lengths = []

    class Recorder:
        model = tokenizers["gpt2"].model

        def encode(self, text: str, **options: bool) -> object:
            lengths.append(len(text))
            return tokenizers["gpt2"].encode(text, **options)

    text = "x = 1\n" * 20_000
    for _ in LongEncoder(Recorder(), WINDOW, OVERLAP).encode([text]):
        pass
    assert max(lengths) <= WINDOW + OVERLAP
    assert sum(lengths) < 1.2 * len(text)
