"""Test that Transformers and SentencePiece give the same ids, and that decoding restores the text."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from hypermoe_ds.data.readers import ReadOptions
from hypermoe_ds.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_file
from hypermoe_ds.errors import UserError
from tests.helpers.corpus import TokenisedCorpus, stdlib_texts, write_jsonl

TEXTS = [
    "",
    " ",
    "\n",
    "def f(x):\n    return  x  # two  spaces\n",
    "\tif x:\n\t\treturn\t1\n\n\n",
    "trailing   \n   leading",
    "line\r\nline\r\n\r",
    "Zwölf Boxkämpfer, 日本語の文章, Ελληνικά, עברית, हिन्दी",
    "🎉👩‍👩‍👧 e\u0301 \u200b \u00a0 \ufeff",
    "3.14159 1_000_000 0xFF",
    "a </s> b <s> <unk> <pad> <0x41> c",
    "nul \0 bell \a",
    "x" * 5000,
    *(" " * count + "x" + " " * count for count in range(1, 70)),
]


def test_ids_equal_those_of_sentencepiece_and_decode_to_the_same_text(
    corpus: TokenisedCorpus,
) -> None:
    loaded = AutoTokenizer.from_pretrained(str(corpus.tokenizer), local_files_only=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(corpus.tokenizer / "tokenizer.model"))
    texts = TEXTS + [path.read_text(encoding="utf-8") for path in corpus.texts]
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert ids == reference.encode(text), text[:80]
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids), "names of control tokens are encoded as text"


def test_a_round_trip_turns_the_sentencepiece_space_symbol_into_a_space(corpus: TokenisedCorpus) -> None:
    loaded = load_tokenizer(corpus.tokenizer)
    assert loaded.decode(loaded("a\u2581b")["input_ids"]) == "a b"


def test_the_tokenizer_has_the_requested_size_and_control_tokens(corpus: TokenisedCorpus) -> None:
    loaded = load_tokenizer(corpus.tokenizer)
    assert len(loaded) == 1000
    control_tokens = (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    assert control_tokens == (0, 1, 2, 3)
    assert loaded.decode([1, *loaded("x")["input_ids"], 2], skip_special_tokens=True) == "x"


def test_an_indentation_of_8_spaces_is_one_token(corpus: TokenisedCorpus) -> None:
    assert len(load_tokenizer(corpus.tokenizer)("        ")["input_ids"]) == 1


def test_a_tokenizer_saved_by_transformers_gives_the_same_ids(corpus: TokenisedCorpus, tmp_path: Path) -> None:
    loaded = load_tokenizer(corpus.tokenizer)
    loaded.save_pretrained(tmp_path)
    reloaded = load_tokenizer(tmp_path)
    assert all(reloaded(text)["input_ids"] == loaded(text)["input_ids"] for text in TEXTS)
    assert vocabulary_file(tmp_path).name == "tokenizer.json"


def test_training_on_text_and_jsonl_files_gives_the_same_tokenizer(tmp_path: Path) -> None:
    files = stdlib_texts(4)
    lines = write_jsonl(tmp_path / "lines.jsonl", [path.read_text(encoding="utf-8") for path in files], "body")
    train_tokenizer(files, 500, tmp_path / "a")
    (tmp_path / "b").mkdir()  # an empty output folder is accepted
    train_tokenizer([lines], 500, tmp_path / "b", ReadOptions(text_field="body"))
    first, second = (tmp_path / name / "tokenizer.model" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "lines.jsonl"]
    assert oct((tmp_path / "a").stat().st_mode) == oct((tmp_path / "b").stat().st_mode) != oct(0o40700)


def test_training_uses_lines_of_any_length(tmp_path: Path) -> None:
    words = [f"wörd{number}" for number in range(3000)]
    (tmp_path / "one_line.txt").write_text(" ".join(words))
    train_tokenizer([tmp_path / "one_line.txt"], 287, tmp_path / "tokenizer")
    ids = load_tokenizer(tmp_path / "tokenizer")("wörd")["input_ids"]
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("break_folder", "problem"),
    [
        (shutil.rmtree, "no such tokenizer folder"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"junk" * 99), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    ],
)
def test_a_missing_or_damaged_tokenizer_is_refused(
    corpus: TokenisedCorpus, tmp_path: Path, break_folder: object, problem: str
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(corpus.tokenizer, folder)
    break_folder(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=problem):
        load_tokenizer(folder)


def test_a_tokenizer_without_an_eos_token_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "b"}))
    assert load_tokenizer(tmp_path).eos_token_id == 1


@pytest.mark.parametrize(
    ("tokenizer_config", "config"),
    [
        ({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, None),
        ({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}, None),
        ({"tokenizer_class": None}, {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}),
    ],
)
def test_code_in_a_tokenizer_folder_is_never_run(
    corpus: TokenisedCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer_config: dict[str, object],
    config: dict[str, object] | None,
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(corpus.tokenizer, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **tokenizer_config}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nTokenizer = Config = object\n")
    prompts: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": prompts.append(prompt) or "y")
    try:
        load_tokenizer(folder)
    except UserError as error:
        assert "needs code from the folder (auto_map), which is never executed" in str(error)  # noqa: PT017
    assert (prompts, (tmp_path / "ran").exists()) == ([], False)
