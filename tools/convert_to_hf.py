"""Write a run's model as a Hugging Face folder."""

import argparse
from pathlib import Path

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.weights import load_model
from hypermoe_ds.errors import one_line_errors
from hypermoe_ds.export.bake import bake
from hypermoe_ds.export.hf import check_output, export


def main() -> None:
    """Arguments and wiring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN_DIR", help="run folder (run.dir)")
    parser.add_argument(
        "--step", type=int, metavar="N", help="optimizer step of the checkpoint; the newest if left out"
    )
    parser.add_argument(
        "--bake", action="store_true", help="write N adapters a layer in the place of the hypernetwork (K = 1 or route)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    arguments = parser.parse_args()

    check_output(arguments.output)
    run = RunFolder(arguments.checkpoint)
    model = load_model(run, arguments.step)
    model = bake(model) if arguments.bake else model
    export(model, run.tokenizer, arguments.output)
    parameters = model.config.parameter_counts().total
    print(f"{arguments.output}: {parameters / 1e6:,.1f} M parameters in {str(model.dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    with one_line_errors():
        main()
