"""Export the model of a run to a Hugging Face folder."""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from hypermoe_ds.files import check_input, check_output
from hypermoe_ds.process import one_line_errors


def main() -> None:
    """Export the model and print its size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN_DIR", help="run folder (run.dir)")
    parser.add_argument("--step", type=int, metavar="N", help="optimizer step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--bake",
        action="store_true",
        help="write N HyperExperts per layer instead of the hypernetwork (only for K = 1 or hyper_conditioning=route)",
    )
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="precision of the weights (default: the run's)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of one file, such as 200MB (default: 5GB)"
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template for apply_chat_template (default: the tokenizer's own)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to create")
    arguments = parser.parse_args()

    check_output(arguments.output)
    check_input(arguments.checkpoint)
    from hypermoe_ds.checkpoint.run_folder import RunFolder
    from hypermoe_ds.checkpoint.weights import PRECISIONS, open_weights
    from hypermoe_ds.export.bake import bake_weights
    from hypermoe_ds.export.hf import export, shard_bytes_of
    from hypermoe_ds.export.model_card import write_model_card
    from hypermoe_ds.export.training_record import read_training_record

    shard_bytes = shard_bytes_of(arguments.max_shard_size)
    run = RunFolder(arguments.checkpoint)
    with open_weights(run, arguments.step, PRECISIONS.get(arguments.dtype)) as weights:
        written = bake_weights(weights) if arguments.bake else weights
        card = partial(
            write_model_card,
            model_config=written.config,
            training=read_training_record(run, arguments.step),
            command=shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        )
        same_function = weights if arguments.bake else None
        template = arguments.chat_template
        export(written, run.tokenizer, arguments.output, shard_bytes, same_function, card, template)
    parameters = written.config.parameter_counts().total
    print(f"{arguments.output}: {parameters / 1e6:,.1f} M parameters in {str(written.dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    with one_line_errors():
        main()
