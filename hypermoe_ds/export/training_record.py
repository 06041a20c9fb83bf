"""Read from a run folder how a checkpoint was trained, for the model card of an export."""

from hypermoe_ds.checkpoint.directory import find_checkpoint
from hypermoe_ds.checkpoint.manifest import Manifest
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.export.model_card import TrainingRecord, training_record
from hypermoe_ds.monitor.summary import validation_at


def read_training_record(run: RunFolder, step: int | None = None) -> TrainingRecord:
    """Read the datasets, the number of consumed tokens and, if the step was validated, the validation loss.

    Args:
        run: the run folder.
        step: step of the checkpoint; None selects the newest.

    Raises:
        UserError: the checkpoint does not exist or is damaged.
    """
    manifest = Manifest.read(find_checkpoint(run.checkpoints, step))
    return training_record(
        run.read_settings() if run.settings.is_file() else {},
        manifest.step,
        manifest.state.get("run", {}).get("consumed_samples"),
        validation_at(run.path / "metrics.jsonl", manifest.step),
        manifest.written_by,
    )
