"""The training record of a checkpoint belongs to the step of that checkpoint."""

import json
from pathlib import Path

import yaml

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.export.model_card import TrainingRecord
from hypermoe_ds.export.training_record import read_training_record
from tests.helpers.checkpoints import small_model, training_weights, write_run


def test_a_training_record_has_the_tokens_and_validation_loss_of_its_step(tmp_path: Path) -> None:
    weights = training_weights(small_model())
    run = RunFolder(write_run(tmp_path / "run", small_model(), {3: weights, 5: weights}))
    incomplete = read_training_record(run)
    assert (incomplete.step, dict(incomplete.data), incomplete.tokens, incomplete.valid_loss) == (5, {}, None, None)

    settings = {"data": {"train": [{"prefix": "data/books"}], "sequence_length": 16}, "train": {"precision": "bf16"}}
    run.settings.write_text(yaml.safe_dump(settings))
    records = [{"step": 5, "valid_loss": 2.5}, {"step": 6, "valid_loss": 2.0}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    written_by = incomplete.written_by
    common = {"data": {"books": 1.0}, "sequence_length": 16, "precision": "bf16", "written_by": written_by}
    assert read_training_record(run) == TrainingRecord(step=5, tokens=5 * 8 * 16, valid_loss=2.5, **common)
    assert read_training_record(run, 3) == TrainingRecord(step=3, tokens=3 * 8 * 16, valid_loss=None, **common)
