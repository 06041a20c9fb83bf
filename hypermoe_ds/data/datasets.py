"""Build datasets of fixed-length sequences from token files with megatron-core."""

import hashlib
import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import Dataset

from hypermoe_ds.data.megatron import BlendedDataset, BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig
from hypermoe_ds.data.settings import DataConfig, DatasetConfig, dataset_names
from hypermoe_ds.data.token_files import Metadata, TokenFiles, inspect, read_metadata
from hypermoe_ds.data.tokenizer import embeddings_needed, encoding_digest, load_tokenizer, vocabulary_file
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import sha256_of

_VALIDATION_SEED = 0
_HASHED_ENTRIES = 1 << 16


class SequenceDataset(Dataset[dict[str, torch.Tensor]]):
    """The first `length` samples of a megatron-core dataset.

    A sample consists of `tokens` [S] and `labels` [S], both int64. `labels[t]` is the token after `tokens[t]`.

    Attributes:
        data_order_hash: hash of the sample order. Datasets with the same hash have the same samples in the same order,
            up to the length of the shorter dataset. `build_datasets` documents what changes the hash.
    """

    def __init__(self, samples: Any, length: int, data_order_hash: str) -> None:
        self._samples = samples
        self._length = length
        self.data_order_hash = data_order_hash

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        sample = self._samples[index]
        return {"tokens": sample["tokens"], "labels": sample["labels"]}

    def first(self, length: int) -> "SequenceDataset":
        """Return the first `length` samples."""
        return SequenceDataset(self._samples, length, self.data_order_hash)

    def count_by_dataset(self, first: int, end: int, datasets: int) -> np.ndarray[Any, Any]:
        """Count the samples of each dataset in the range from `first` to `end` (exclusive).

        Args:
            first: index of the first sample.
            end: index after the last sample.
            datasets: number of datasets.
        """
        if not isinstance(self._samples, BlendedDataset):
            return np.array([end - first])
        self[first]  # megatron-core loads its indices when the first sample is read
        return np.bincount(self._samples.dataset_index[first:end], minlength=datasets)

    def describe_sample(self, index: int) -> str:
        """Describe the documents and the token files that a sample comes from."""
        self[index]  # megatron-core loads its indices when the first sample is read
        part, position = self._samples, index
        if isinstance(part, BlendedDataset):
            part, position = part.datasets[part.dataset_index[index]], part.dataset_sample_index[index]
        _, documents = part._query_document_sample_shuffle_indices(position)
        numbers = sorted({int(document) for document in documents})
        return f"document {', '.join(map(str, numbers))} of {part.dataset.path_prefix}"


@dataclass(frozen=True)
class _TokenizerMetadata:
    """Tokenizer attributes that megatron-core reads.

    The class has no `pad`, because megatron-core would replace the pad token with token 0 even in real text.

    Attributes:
        vocab_size: number of tokens.
        eod: id of the token that ends a document.
        unique_identifiers: values that megatron-core includes in the names of cached indices. A checksum of the
            document lengths ensures that replaced token files are indexed again.
    """

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str] = field(default_factory=dict)


def check_datasets(config: DataConfig, vocab_size: int) -> None:
    """Check the tokenizer and all datasets before building any dataset.

    Args:
        config: the data settings.
        vocab_size: number of token embeddings of the model.

    Raises:
        UserError: the tokenizer folder or a token file is missing, a token file is truncated, or a `.bin` file is not
            the one that its `.json` describes. The error is also raised if a dataset was made with another tokenizer or
            is shorter than one sample, or if the tokenizer or a dataset has more token ids than the model. If a dataset
            has no `.json`, its first 16,777,216 tokens are checked here and the others when they are loaded.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    needed = embeddings_needed(tokenizer)
    if needed > vocab_size:
        problem = f"has token ids up to {needed - 1}, but the model has {vocab_size} embeddings"
        raise UserError(f"data.tokenizer={config.tokenizer}", problem, f"set model.vocab_size to {needed} or more")
    for dataset in [*config.train, *config.valid]:
        files = inspect(dataset.prefix)
        metadata = read_metadata(dataset.prefix)
        if metadata is not None:
            _check_content(files, metadata)
            _check_tokenizer(config.tokenizer, tokenizer, dataset, metadata)
        elif (ids := files.largest_token() + 1) > vocab_size:
            problem = f"has token ids up to {ids - 1}, but the model has {vocab_size} embeddings"
            raise UserError(dataset.prefix, problem, f"set model.vocab_size to {ids} or more")
        _check_long_enough(files, config.sequence_length)


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


def _check_long_enough(files: TokenFiles, sequence_length: int) -> None:
    if files.tokens <= sequence_length:
        problem = f"has {files.tokens} tokens, but one sample needs {sequence_length + 1}"
        raise UserError(files.prefix, problem, "lower data.sequence_length or preprocess more text")


def build_datasets(
    config: DataConfig, seed: int, train_samples: int, valid_samples: int | None
) -> tuple[SequenceDataset, dict[str, SequenceDataset]]:
    """Build the training samples and the validation samples (collective under torch.distributed).

    Rank 0 writes the sample indices to the cache and the other ranks read them, so all nodes must share the cache
    folder. Training documents are shuffled and cut into samples, and the samples are shuffled again. Datasets are
    blended so that every range of samples contains each dataset in proportion to its weight.

    The order of the training samples depends on the seed, the datasets, their weights and the sequence length. The
    order also depends on the number of epochs, because megatron-core shuffles all epochs of a dataset together. The
    last epoch is shuffled separately if less than 80 % of it is used. A different `train_samples` changes the order
    only if it changes the number of epochs of a dataset or moves the used part of the last epoch across 80 %. If
    training reads at most one epoch of each dataset, the order does not depend on `train_samples`. If extending a run
    changes `data_order_hash`, some samples are seen twice and others never.

    Validation reads every complete sequence of every dataset once, in an order that depends only on the dataset and the
    sequence length.

    Args:
        config: the data settings, checked by `check_datasets`.
        seed: seed of the training order.
        train_samples: number of training samples.
        valid_samples: approximate number of validation samples, divided among the datasets in proportion to their
            lengths, with at least one sample per dataset. None uses all samples.

    Returns:
        The training samples, and the validation samples of each dataset by name.

    Raises:
        UserError: a token file is missing, truncated or shorter than one sample, or the cache cannot be written or
            read.
    """
    if train_samples <= 0 or (valid_samples is not None and valid_samples <= 0):
        raise ValueError(f"{train_samples=} and {valid_samples=} must be positive")
    tokenizer = load_tokenizer(config.tokenizer)
    metadata = _TokenizerMetadata(len(tokenizer), tokenizer.eos_token_id)
    with _cache_errors(config.cache_folder):
        train = _build_train(config, metadata, seed, train_samples)
        whole = {
            name: _build_valid(config, metadata, dataset)
            for name, dataset in zip(dataset_names(config.valid), config.valid, strict=True)
        }
    total = sum(map(len, whole.values()))
    if valid_samples is None or valid_samples >= total:
        return train, whole
    return train, {name: part.first(max(valid_samples * len(part) // total, 1)) for name, part in whole.items()}


def build_validation_set(prefix: str, tokenizer: str, sequence_length: int, vocab_size: int) -> SequenceDataset:
    """Build the validation samples of one dataset, for use outside a training run.

    Args:
        prefix: path of the token files, without suffix.
        tokenizer: the tokenizer folder that the token files were made with.
        sequence_length: number of tokens per sample.
        vocab_size: number of token embeddings of the model.

    Raises:
        UserError: see `check_datasets` and `build_datasets`.
    """
    dataset = DatasetConfig(prefix=prefix)
    config = DataConfig(train=[dataset], valid=[dataset], sequence_length=sequence_length, tokenizer=tokenizer)
    check_datasets(config, vocab_size)
    loaded = load_tokenizer(tokenizer)
    with _cache_errors(config.cache_folder):
        return _build_valid(config, _TokenizerMetadata(len(loaded), loaded.eos_token_id), dataset)


def _build_train(config: DataConfig, metadata: _TokenizerMetadata, seed: int, train_samples: int) -> SequenceDataset:
    total = sum(dataset.weight for dataset in config.train)
    weights = [dataset.weight / total for dataset in config.train]
    if len(weights) == 1:
        samples = _build_samples(config, metadata, config.train[0].prefix, seed, train_samples)
        return SequenceDataset(samples, train_samples, _data_order_hash([samples], weights))
    # At any point, the blend can exceed a dataset's share by at most as many samples as there are datasets.
    lengths = [int(train_samples * weight) + 1 + len(weights) for weight in weights]
    parts = [
        _build_samples(config, metadata, dataset.prefix, seed, length)
        for dataset, length in zip(config.train, lengths, strict=True)
    ]
    blend = _blend(parts, weights, train_samples)
    return SequenceDataset(blend, train_samples, _data_order_hash(parts, weights))


def _build_valid(config: DataConfig, metadata: _TokenizerMetadata, dataset: DatasetConfig) -> SequenceDataset:
    part = _build_samples(config, metadata, dataset.prefix, _VALIDATION_SEED, None)
    return SequenceDataset(part, len(part), _data_order_hash([part], [len(part)]))


def _build_samples(
    config: DataConfig, metadata: _TokenizerMetadata, prefix: str, seed: int, samples: int | None
) -> GPTDataset:
    """Build at least `samples` samples of one dataset for training, or exactly one epoch if `samples` is None."""
    files = inspect(prefix)
    _check_long_enough(files, config.sequence_length)
    identity = {"document_lengths_crc32": f"{files.lengths_crc32:08x}", "content": files.digest}
    blend = ([prefix], None)
    settings = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=config.sequence_length,
        blend_per_split=[None, blend, None] if samples is None else [blend, None, None],
        path_to_cache=config.cache_folder,
        tokenizer=replace(metadata, unique_identifiers=identity),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    splits = BlendedMegatronDatasetBuilder(GPTDataset, [samples, samples, 0], _on_every_rank, settings).build()
    return next(split for split in splits if split is not None)


def _blend(parts: Sequence[GPTDataset], weights: Sequence[float], length: int) -> BlendedDataset:
    """Interleave datasets in proportion to their weights."""
    settings = parts[0].config
    if not torch.distributed.is_initialized():
        # If there is a cache, megatron-core 0.16 queries the rank even without a process group.
        settings = replace(settings, path_to_cache=None)
    with _quiet("megatron.core.datasets.blended_dataset"):
        return BlendedMegatronDatasetBuilder.build_generic_dataset(
            BlendedDataset, _on_every_rank, True, list(parts), list(weights), length, settings
        )


def _on_every_rank() -> bool:
    return True


def _data_order_hash(parts: Sequence[GPTDataset], weights: Sequence[float]) -> str:
    """Hash the weights and the start of each dataset's shuffled indices, which determine the order."""
    digest = hashlib.sha256(repr(list(weights)).encode())
    for part in parts:
        identity = part.config.tokenizer.unique_identifiers
        digest.update(repr((part.config.sequence_length, sorted(identity.items()))).encode())
        digest.update(part.document_index[:_HASHED_ENTRIES].tobytes())
        digest.update(part.shuffle_index[:_HASHED_ENTRIES].tobytes())
    return digest.hexdigest()


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Suppress the warnings that a megatron-core logger prints about intended behaviour."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextmanager
def _cache_errors(cache: str) -> Iterator[None]:
    """Raise a `UserError` if the cache cannot be used, for example because files are truncated or missing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # under torch.distributed, megatron-core wraps an OSError in a plain Exception
        cause = error.__cause__ or error
        if isinstance(cause, MemoryError):
            problem = f"the index of the samples does not fit into memory ({cause})"
            raise UserError("train.steps", problem, "lower it or train.global_batch_size") from error
        if isinstance(cause, FileNotFoundError):
            remedy = "set data.cache to a folder that all nodes share"
        elif isinstance(cause, (OSError, EOFError, ValueError, pickle.UnpicklingError)):
            remedy = "remove that folder, or set data.cache to a writable folder"
        else:
            raise
        raise UserError(f"data.cache={cache}", f"the indices cannot be written or read ({cause})", remedy) from error
