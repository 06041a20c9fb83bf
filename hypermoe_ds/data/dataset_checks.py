"""Check the tokenizer and the token files of a recipe before training."""

from pathlib import Path
from typing import Any

from hypermoe_ds.data.settings import DataConfig, DatasetConfig
from hypermoe_ds.data.token_files import Metadata, TokenFiles, inspect, read_metadata
from hypermoe_ds.data.tokenizer import embeddings_needed, encoding_digest, load_tokenizer, vocabulary_file
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import sha256_of


def check_datasets(config: DataConfig, vocab_size: int) -> None:
    """Check the tokenizer and all datasets before building any dataset.

    Args:
        config: the data settings.
        vocab_size: number of token embeddings of the model.

    Raises:
        UserError: the tokenizer folder or a token file is missing, a token file is truncated, or a `.bin` file is not
            the one that its `.json` describes. The error is also raised if a dataset was made with another tokenizer or
            is shorter than one sample, or if the tokenizer or a dataset has more token ids than the model. If a dataset
            has no `.json`, its first 16,777,216 tokens are checked here and the rest when they are loaded.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    needed = embeddings_needed(tokenizer)
    if needed > vocab_size:
        problem = f"has token ids up to {needed - 1}, but the model has {vocab_size} embeddings"
        raise UserError(f"data.tokenizer={config.tokenizer}", problem, f"set model.vocab_size to {needed} or more")
    for dataset in config.all_datasets():
        files = inspect(dataset.prefix)
        metadata = read_metadata(dataset.prefix)
        if metadata is not None:
            _check_content(files, metadata)
            _check_tokenizer(config.tokenizer, tokenizer, dataset, metadata)
        elif (ids := files.largest_token() + 1) > vocab_size:
            problem = f"has token ids up to {ids - 1}, but the model has {vocab_size} embeddings"
            raise UserError(dataset.prefix, problem, f"set model.vocab_size to {ids} or more")
        if config.document_mask and (last := files.last_token()) != tokenizer.eos_token_id:
            problem = f"ends with token {last} instead of the end-of-sequence token {tokenizer.eos_token_id}"
            remedy = "end each document with it, or set data.document_mask=false"
            raise UserError(f"{dataset.prefix}.bin", problem, remedy)
        files.samples_per_epoch(config.sequence_length)
    for stage in config.all_stages()[1:]:
        for dataset in stage.train:
            inspect(dataset.prefix).samples_per_epoch(stage.sequence_length)


def _check_content(files: TokenFiles, metadata: Metadata) -> None:
    if metadata.tokens != files.tokens or metadata.bin_digest not in ("", files.digest):
        problem = f"is not the file that {files.prefix}.json describes"
        raise UserError(f"{files.prefix}.bin", problem, "restore it, or run tools/preprocess_data.py again")


def _check_tokenizer(folder: str, tokenizer: Any, dataset: DatasetConfig, metadata: Metadata) -> None:
    path = Path(folder) / metadata.tokenizer_file
    problem = f"was made with another tokenizer than {folder}"
    if not path.is_file():
        problem += f", which has no {metadata.tokenizer_file}"
    elif (read := vocabulary_file(folder).name) != metadata.tokenizer_file:
        problem += f", which is loaded from {read}, not from {metadata.tokenizer_file}"
    elif sha256_of(path) != metadata.tokenizer_sha256:
        problem += f", whose {metadata.tokenizer_file} differs"
    elif (
        metadata.vocab_size not in (embeddings_needed(tokenizer), len(tokenizer))  # older files store len(tokenizer)
        or tokenizer.eos_token_id != metadata.eos_id
    ):
        problem += (
            f", with {metadata.vocab_size} token ids and end-of-sequence token {metadata.eos_id} "
            f"instead of {embeddings_needed(tokenizer)} and {tokenizer.eos_token_id}"
        )
    elif metadata.encoding_sha256 not in ("", encoding_digest(tokenizer)):
        problem += ", which encodes text differently (compare their tokenizer_config.json)"
    else:
        return
    remedy = f"set data.tokenizer (it was {metadata.tokenizer}), or run tools/preprocess_data.py with the new tokenizer"
    raise UserError(dataset.prefix, problem, remedy)
