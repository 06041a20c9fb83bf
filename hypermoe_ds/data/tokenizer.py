"""Train SentencePiece BPE tokenizers, save them as folders for Transformers, and load tokenizer folders."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from hypermoe_ds.data.inputs import InputFile, Kind, find_inputs
from hypermoe_ds.data.readers import Document, DocumentReader, LongText, ReadOptions, ReadReport
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import check_output, file_of, scratch_folder, sha256_of
from hypermoe_ds.progress import progress

# SentencePiece silently skips lines longer than its limit, so long lines are split. With these limits on the length and
# number of lines, the text in memory takes at most 4 GB, because a UTF-8 character has at most 4 bytes.
_LINE_CHARACTERS = 1024
_LINES = 1_000_000
_SEED = 0

_CONTROL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

# If a folder has none of these files, Transformers silently loads a tokenizer with four tokens.
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_OTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
# The probe text contains examples of everything that tokenizer settings can change: spaces, capitals, accents, other
# scripts, control characters and control tokens.
_PROBE = "Def f(x):\n\treturn  1.5e-3  # é e\u0301 ß 漢字 🙂 \u00a0</s> <s> A\r\nb"
_GIVE_A_FOLDER = "give a folder with tokenizer.model or tokenizer.json, as tools/train_tokenizer.py writes"


def train_tokenizer(
    inputs: Iterable[str | Path],
    vocab_size: int,
    output: str | Path,
    options: ReadOptions | None = None,
    unknown_as: Kind | None = None,
) -> ReadReport:
    """Train a byte-fallback BPE tokenizer and write it to a folder.

    Decoding restores the text exactly, except that U+2581, which SentencePiece uses for a space, is decoded as a space.
    The tokenizer is trained on at most 1,000,000 lines, sampled uniformly with a fixed seed. The same inputs always
    result in the same tokenizer.

    Args:
        inputs: input files and folders; see `inputs.find_inputs`.
        vocab_size: number of tokens, including control tokens and the tokens of the 256 bytes.
        output: folder to write, with `tokenizer.model` and `tokenizer_config.json`.
        options: how documents are read.
        unknown_as: kind to assume for files with an unknown suffix; with None, such files are an error.

    Returns:
        Counts of documents and rejections.

    Raises:
        UserError: `output` is not empty, an input is invalid, there is no text, or `vocab_size` does not fit the text.
    """
    output = Path(output)
    check_output(output)
    if vocab_size <= 0:
        raise UserError(f"vocab_size={vocab_size}", "is not a number of tokens", "give a positive number such as 32000")
    options = options or ReadOptions()
    files = find_inputs(inputs, unknown_as)
    report = ReadReport()
    with scratch_folder(output) as scratch:
        lines = _lines(progress(_documents(files, options, report), "read", "documents"))
        model = _train(lines, vocab_size, report, options.text_field)
        folder = scratch / output.name
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model)
        (folder / "tokenizer_config.json").write_text(json.dumps(_folder_config(), indent=2) + "\n")
        folder.rename(output)
    return report


def _folder_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        # The text "</s>" inside a document must not end the document.
        "split_special_tokens": True,
        **_CONTROL_TOKENS,
    }


def _documents(files: Iterable[InputFile], options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    for file in files:
        for document in DocumentReader(file, options, report.reject):
            report.documents += 1
            yield document


def _lines(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        for piece in document.pieces() if isinstance(document, LongText) else [document]:
            for line in piece.split("\n"):
                for start in range(0, len(line), _LINE_CHARACTERS):
                    yield line[start : start + _LINE_CHARACTERS]


class _RecordingLines:
    """Iterate over lines and keep the exception that stops the iteration.

    SentencePiece reports only the message of the exception.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._lines
        except BaseException as error:
            self.error = error
            raise


def _train(lines: Iterator[str], vocab_size: int, report: ReadReport, text_field: str) -> bytes:
    """Train a tokenizer and return the serialised SentencePiece model."""
    recording = _RecordingLines(lines)
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(_SEED)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(recording),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # encode several spaces of indentation as one token
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            input_sentence_size=_LINES,
            shuffle_input_sentence=True,
            max_sentence_length=4 * _LINE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if recording.error is not None:
            raise recording.error from None
        report.require_documents(text_field)
        raise _training_error(str(error), vocab_size) from None
    return model.getvalue()


def _training_error(message: str, vocab_size: int) -> UserError:
    """Convert a SentencePiece error to a user error with a remedy."""
    where = f"vocab_size={vocab_size}"
    if too_large := re.search(r"too high .*<= (\d+)", message):
        return UserError(where, "is too large for this text", f"give at most {too_large[1]}, or more text")
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(where, "is too small for the characters of this text", f"give more than {too_small[1]}")
    return UserError(where, f"SentencePiece failed ({message})", "change vocab_size or the inputs")


def load_tokenizer(folder: str | Path) -> Any:
    """Load a Hugging Face tokenizer folder from disk, without running code from the folder.

    Returns:
        A `transformers.PreTrainedTokenizerBase` whose `eos_token_id` ends a document.

    Raises:
        UserError: the folder does not exist, the tokenizer cannot be loaded or needs code from the folder (`auto_map`),
            a file is a link to a target outside the folder, or the tokenizer has no end-of-sequence token.
    """
    tokenizer_files(Path(folder))
    import transformers  # noqa: PLC0415 (importing takes seconds, so the folder is checked first)

    try:
        # Unless trust_remote_code is False, Transformers asks on the terminal whether to run code from the folder.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer("text")  # some damage is detected only at first use
    except Exception as error:  # each tokenizer class raises different errors
        if "trust_remote_code" in str(error):
            problem = "its tokenizer needs code from the folder (auto_map), which is never executed"
            raise UserError(str(folder), problem, "save it with a tokenizer class of Transformers") from None
        raise UserError(str(folder), f"its tokenizer cannot be loaded ({error})", _GIVE_A_FOLDER) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            str(folder), "its tokenizer has no eos_token to end a document", "set it in tokenizer_config.json"
        )
    return tokenizer


def tokenizer_files(folder: Path) -> list[Path]:
    """List the tokenizer files of a folder, which may also contain a model.

    Raises:
        UserError: the folder has no tokenizer, or a file is a link to a target outside the folder. Copying the folder
            would publish the target.
    """
    vocabulary_file(folder)
    return [file_of(folder, name) for name in (*_VOCABULARY_FILES, *_OTHER_FILES) if (folder / name).exists()]


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer files of a folder, which may also contain a model.

    Raises:
        UserError: see `tokenizer_files` and `load_tokenizer`.
    """
    files = tokenizer_files(folder)
    target.mkdir(parents=True)
    for path in files:
        shutil.copy(path, target)
    load_tokenizer(target)


def vocabulary_file(folder: str | Path) -> Path:
    """Return the vocabulary file of a tokenizer folder.

    Raises:
        UserError: the folder does not exist or has no tokenizer.
    """
    if not Path(folder).is_dir():
        raise UserError(str(folder), "no such tokenizer folder", _GIVE_A_FOLDER)
    for name in _VOCABULARY_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise UserError(str(folder), "has no tokenizer", _GIVE_A_FOLDER)


def vocabulary_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each tokenizer file that affects token ids, by file name."""
    names = (*_VOCABULARY_FILES, "merges.txt", "added_tokens.json")
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}


def encode_as_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text; control tokens in the text are encoded as ordinary text."""
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    ids: list[int] = encoding["input_ids"]
    return ids


def encoding_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of a probe text's token ids, which also depend on settings outside the vocabulary."""
    return hashlib.sha256(json.dumps(encode_as_text(tokenizer, _PROBE)).encode()).hexdigest()


def embeddings_needed(tokenizer: Any) -> int:
    """Return the largest token id plus 1, which exceeds the tokenizer's length if ids have gaps."""
    return 1 + int(max(tokenizer.get_vocab().values()))
