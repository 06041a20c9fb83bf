"""Build a small text corpus from the source files of Python's standard library."""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hypermoe_ds.data.megatron import IndexedDatasetBuilder
from hypermoe_ds.data.preprocess import Job, preprocess
from hypermoe_ds.data.tokenizer import train_tokenizer

# fmt: off
_MODULES = (
    "abc", "argparse", "base64", "bisect", "calendar", "cmd", "code", "codecs", "colorsys", "contextlib",
    "copy", "csv", "dataclasses", "datetime", "difflib", "enum", "filecmp", "fnmatch", "fractions", "functools",
    "getopt", "glob", "gzip", "hashlib", "heapq", "hmac", "imaplib", "inspect", "keyword", "linecache",
)
# fmt: on


@dataclass(frozen=True)
class TokenisedCorpus:
    """Paths of a small corpus, its tokenizer and its token files.

    Attributes:
        texts: text files with one document each.
        tokenizer: tokenizer folder.
        train: path prefix of the training token files, which contain all texts except the last four.
        valid: path prefix of the validation token files, which contain the last four texts.
    """

    texts: list[Path]
    tokenizer: Path
    train: str
    valid: str


def stdlib_texts(count: int = len(_MODULES)) -> list[Path]:
    """Return the paths of the first `count` source files of the corpus."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [folder / f"{name}.py" for name in _MODULES[:count]]


def write_jsonl(path: Path, texts: list[str], text_field: str = "text") -> Path:
    """Write a JSONL file with one object per text, and return its path."""
    path.write_text("".join(json.dumps({text_field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tokenised_corpus(folder: Path, vocab_size: int = 1000) -> TokenisedCorpus:
    """Train a tokenizer on the corpus, and write the tokenizer and the token files to `folder`.

    This takes a few seconds.
    """
    texts = stdlib_texts()
    corpus = TokenisedCorpus(texts, folder / "tokenizer", str(folder / "train"), str(folder / "valid"))
    train_tokenizer(texts, vocab_size, corpus.tokenizer)
    for prefix, part in ((corpus.train, texts[:-4]), (corpus.valid, texts[-4:])):
        preprocess(Job([str(path) for path in part], str(corpus.tokenizer), prefix))
    return corpus


def write_token_files(prefix: str, documents: list[list[int]], large: bool = False) -> None:
    """Write the `.bin` and `.idx` files of documents, given as token ids, but not the `.json` metadata file.

    Args:
        prefix: path of the files without the suffix.
        documents: token ids of each document.
        large: store the ids as int32 instead of uint16.
    """
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32 if large else np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
