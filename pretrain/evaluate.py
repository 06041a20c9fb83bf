"""Compute the loss and perplexity of a run or a Hugging Face model on tokenised data."""

import argparse
import math
from functools import partial
from pathlib import Path

from hypermoe_ds.config import LARGEST_COUNT
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import check_input
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.progress import progress


def main() -> None:
    """Evaluate the model and print the results in one line."""
    arguments = parse_arguments()
    for option in ("sequence_length", "micro_batch_size"):
        value = getattr(arguments, option)
        if value is not None and not 1 <= value <= LARGEST_COUNT:
            where = f"--{option.replace('_', '-')}={value}"
            raise UserError(where, "is out of range", f"give 1 to {LARGEST_COUNT}")
    check_input(arguments.checkpoint)
    import torch

    from hypermoe_ds.checkpoint.run_folder import RunFolder
    from hypermoe_ds.data.loader import validation_batches
    from hypermoe_ds.data.settings import DataConfig
    from hypermoe_ds.data.token_files import read_metadata
    from hypermoe_ds.data.tokenizer import load_tokenizer
    from hypermoe_ds.data.validation_set import build_validation_set
    from hypermoe_ds.device import uses_gpu
    from hypermoe_ds.export.hf import load_any
    from hypermoe_ds.training.evaluation import evaluate, without_hyper_experts

    model, tokenizer = load_any(arguments.checkpoint, arguments.step)
    run = RunFolder(arguments.checkpoint)
    # A run that was initialised from weights and has not trained yet has no settings.
    data = run.section("data", DataConfig) if run.exists() and run.settings.exists() else None
    length = arguments.sequence_length or (data.sequence_length if data else model.config.max_position_embeddings)
    masked = arguments.document_mask if arguments.document_mask is not None else data is not None and data.document_mask
    document_end = load_tokenizer(str(tokenizer)).eos_token_id if masked else None

    samples = build_validation_set(arguments.data, str(tokenizer), length, model.config.vocab_size)
    device = torch.device("cuda" if uses_gpu() else "cpu")
    batches = partial(
        validation_batches, samples, arguments.micro_batch_size, 0, 1, model.config.vocab_size, document_end
    )
    total = -(-len(samples) // arguments.micro_batch_size)
    result = evaluate(model.to(device), progress(batches(), "evaluate", "batches", total), device)
    parts = [f"loss {result.loss:.6f}", f"perplexity {result.perplexity:.4f}"]
    metadata = read_metadata(arguments.data)
    if metadata is not None:
        parts.append(f"{result.loss / math.log(2) / metadata.bytes_per_token:.4f} bits/byte")
    if model.config.hypernetwork and model.config.moe_layers:
        with without_hyper_experts(model):
            without = evaluate(model, progress(batches(), "evaluate without HyperExperts", "batches", total), device)
        parts.append(f"HyperExperts contribute {without.loss - result.loss:+.4f} nats per token")
    masking = ", documents masked" if masked else ""
    parts.append(f"{result.tokens:,} tokens of {arguments.data} in sequences of {length}{masking}")
    print(" | ".join(parts))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="run folder or Hugging Face folder"
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="path of token files, without .bin and .idx")
    parser.add_argument("--step", type=int, metavar="N", help="step of a run's checkpoint (default: the newest)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="tokens per sequence (default: data.sequence_length of the run, or max_position_embeddings of the model)",
    )
    parser.add_argument(
        "--document-mask",
        action=argparse.BooleanOptionalAction,
        help="separate the documents in a sequence (default: data.document_mask of the run, or no)",
    )
    parser.add_argument("--micro-batch-size", type=int, default=8, metavar="SEQUENCES", help="default: 8")
    return parser.parse_args()


if __name__ == "__main__":
    with one_line_errors():
        main()
