"""Print the results of a run and the loss of a unigram baseline on the same validation data."""

import argparse
import sys
from pathlib import Path

from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import check_input
from hypermoe_ds.monitor.summary import summarize
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.training.settings import EvaluationConfig


def main() -> None:
    """Read the run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN_DIR", help="run folder (run.dir)")
    path = parser.parse_args().checkpoint
    check_input(path)
    from hypermoe_ds.checkpoint.run_folder import RunFolder
    from hypermoe_ds.data.unigram import count_tokens, unigram_loss
    from hypermoe_ds.data.validation_set import build_validation_sets

    folder = RunFolder(path)

    model, data = folder.model_config(), folder.section("data", DataConfig)
    max_samples = folder.section("evaluation", EvaluationConfig).max_samples
    summary = summarize(folder.path / "metrics.jsonl")
    valid_sets = build_validation_sets(data.valid, data.sequence_length, max_samples)
    if not valid_sets:
        raise UserError(f"{folder.settings}: data.valid", "is empty", "add a validation dataset to the run")
    counts = count_tokens([dataset.prefix for dataset in data.train], model.vocab_size)
    samples = sum(map(len, valid_sets.values()))  # all samples have the same length
    unigram = sum(unigram_loss(counts, valid_set) * len(valid_set) for valid_set in valid_sets.values()) / samples

    gain = unigram - summary.valid_loss
    comparison = "better" if gain >= 0 else "worse"
    rows = {
        "steps": f"{summary.step:,}",
        "tokens": f"{summary.consumed_samples * data.sequence_length:,}",
        "tokens/s": f"{summary.tokens_per_second:,.0f} (median)",
        "validation loss": f"{summary.valid_loss:.3f} nats per token",
        "unigram loss": f"{unigram:.3f} nats per token: the model is {abs(gain):.3f} {comparison}",
        "run folder": str(folder.path),
    }
    board = folder.path / "tensorboard"
    if board.is_dir():
        rows["TensorBoard"] = f"{Path(sys.executable).with_name('tensorboard')} --logdir {board}"
    for name, value in rows.items():
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    with one_line_errors():
        main()
