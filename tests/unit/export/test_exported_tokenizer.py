"""Control tokens in a text: an exported tokenizer parses them, and training encodes them as text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hypermoe_ds.data.encoding import Encoder
from hypermoe_ds.data.tokenizer import copy_tokenizer, load_tokenizer, train_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.export.tokenizer import write_tokenizer
from tests.helpers.corpus import stdlib_texts

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "f(x)"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "tokenizer"
    train_tokenizer(stdlib_texts(1), 350, folder)
    return folder


@pytest.fixture
def exported(trained: Path, tmp_path: Path) -> Path:
    write_tokenizer(trained, tmp_path / "exported")
    return tmp_path / "exported"


def test_an_exported_tokenizer_parses_control_tokens_in_text(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("</s>")["input_ids"] == [2]
    ids = tokenizer("a </s>\n<s>b")["input_ids"]
    assert [i for i in ids if i < 4] == [2, 1]
    assert tokenizer.decode(ids) == "a </s>\n<s>b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a \nb"


def test_other_text_has_the_same_ids_as_in_training(trained: Path, exported: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(exported), load_tokenizer(trained)
    for text in (*(path.read_text() for path in stdlib_texts(3)), "  x\n\t\tö 🎉"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]


@pytest.mark.parametrize("saved_again", [False, True])
def test_a_run_encodes_control_tokens_as_text_even_with_an_exported_tokenizer(
    trained: Path, exported: Path, tmp_path: Path, saved_again: bool
) -> None:
    if saved_again:  # the Trainer also saves the tokenizer again
        AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path / "saved")
        exported = tmp_path / "saved"
    copy_tokenizer(exported, tmp_path / "run")
    for text in ("a </s> b", "<s>", "</s></s>", "<pad><unk>x"):
        [(ids, _)] = Encoder(str(tmp_path / "run")).encode([text])
        [(expected, _)] = Encoder(str(trained)).encode([text])
        assert ids.tolist() == expected.tolist()
        assert ids[-1] == 2
        assert not set(ids[:-1].tolist()) & {0, 1, 2, 3}


def test_export_disables_split_special_tokens(trained: Path, tmp_path: Path) -> None:
    load_tokenizer(trained).save_pretrained(tmp_path / "fast")
    config = tmp_path / "fast" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "split_special_tokens": True}))
    assert len(load_tokenizer(tmp_path / "fast")("</s>")["input_ids"]) > 1
    write_tokenizer(tmp_path / "fast", tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("</s>")["input_ids"] == [2]


def test_chats_of_fine_tuning_end_with_the_eos_token(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    write_tokenizer(trained, tmp_path / "exported", tmp_path / "chat.jinja")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "<s>user\ndef f</s><s>assistant\nf(x)</s>"
    ids = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i < 4] == [1, 2, 1, 2]
    assert ids[-1] == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path / "tuned")
    again = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert again.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"] == ids


def test_a_given_chat_template_replaces_that_of_the_tokenizer(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "own")
    config = tmp_path / "own" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "old {{ messages[0].content }}"}))
    write_tokenizer(tmp_path / "own", tmp_path / "kept")
    assert AutoTokenizer.from_pretrained(tmp_path / "kept").chat_template == "old {{ messages[0].content }}"
    (tmp_path / "chat.jinja").write_text(CHAT)
    write_tokenizer(tmp_path / "own", tmp_path / "new", tmp_path / "chat.jinja")
    assert AutoTokenizer.from_pretrained(tmp_path / "new").chat_template == CHAT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"{% for %}", "cannot be rendered"),
        (b"{{ raise_exception('no') }}", r"cannot be rendered for a user's message \(no\)"),
        (b"{{ messages[0].content + 1 }}", "cannot be rendered"),
        (b"{{ messages.append(1) }}", "cannot be rendered"),
        (b"", "omits the user's message"),
    ],
)
def test_a_chat_template_that_does_not_render_a_message_is_refused(
    content: bytes | None, message: str, trained: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--chat-template={path}: {message}"):
        write_tokenizer(trained, tmp_path / "exported", path)


def test_links_out_of_a_tokenizer_folder_are_not_followed(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "own")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "own" / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"merges.txt: is a link that leads out of the folder"):
        write_tokenizer(tmp_path / "own", tmp_path / "exported")
    with pytest.raises(UserError, match=r"merges.txt: is a link that leads out of the folder"):
        load_tokenizer(tmp_path / "own")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        "[" * 200_000,
        '{"eos_token": {"content": 3}}',
        '{"eos_token": []}',
        '{"eos_token": "</s>", "model_max_length": "x"}',
    ],
    ids=lambda content: content[:40],
)
def test_a_damaged_tokenizer_config_is_refused(content: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="damaged: its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "damaged")
