"""Share a Hugging Face folder, as `tools/convert_to_hf.py` writes it, among the export tests."""

from pathlib import Path

import pytest

from hypermoe_ds.data.tokenizer import train_tokenizer
from hypermoe_ds.export.hf import export
from hypermoe_ds.export.weight_loader import weights_of
from tests.helpers.checkpoints import small_model
from tests.helpers.corpus import stdlib_texts


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export an untrained model. Untied embeddings and large weights keep it from repeating one token forever."""
    folder = tmp_path_factory.mktemp("exported")
    train_tokenizer(stdlib_texts(1), 400, folder / "tokenizer")
    model = small_model(vocab_size=400, tie_word_embeddings=False, initializer_range=0.2, max_position_embeddings=64)
    export(weights_of(model), folder / "tokenizer", folder / "model", shard_bytes=10**9)
    return folder / "model"
