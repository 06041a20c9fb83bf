"""Pretrain a HyperMoE language model with DeepSpeed.

deepspeed [--hostfile F] pretrain/train.py --config R.yaml --deepspeed_config F.json [section.key=value ...]
"""

import argparse
import shutil
import sys
from pathlib import Path

from hypermoe_ds.data.token_files import check_files
from hypermoe_ds.monitor.console import Console
from hypermoe_ds.monitor.output_streams import log_level, redirect_output, restore_terminal
from hypermoe_ds.process import global_rank, one_line_errors
from hypermoe_ds.run_config import load_run_config, settings_help
from hypermoe_ds.training.ds_config import load_deepspeed_json


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    help_of_settings = settings_help(shutil.get_terminal_size().columns) if {"-h", "--help"} & set(sys.argv) else ""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=help_of_settings, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="R.yaml", help="recipe: model, data, batch, schedule, ...")
    parser.add_argument(
        "--deepspeed_config",
        required=True,
        metavar="F.json",
        help="DeepSpeed configuration, such as ds_configs/zero1.json",
    )
    parser.add_argument("--print-config", action="store_true", help="print the recipe with all settings and exit")
    parser.add_argument("--check", action="store_true", help="check settings and paths, print the run folder and exit")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' output (HYPERMOE_LOG_LEVEL=info)")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a setting of the recipe")
    return parser.parse_intermixed_args()


def main() -> int:
    """Check the settings without torch, then load the libraries and train; return the exit code."""
    restore_terminal()
    with one_line_errors():
        arguments = parse_arguments()
        deepspeed_json = load_deepspeed_json(arguments.deepspeed_config)
        recipe = load_run_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(recipe.resolved().to_yaml(), end="")
            return 0
        level = log_level(arguments.verbose)
        check_files(recipe.data)
        if arguments.check:
            print(recipe.run.dir)
            return 0
        streams = redirect_output(Path(recipe.run.dir), level)
    with one_line_errors(streams.err, streams.log), Console(global_rank(), streams.out) as console:
        with console.phase("loading libraries"):
            from hypermoe_ds.job import train
        return train(recipe, deepspeed_json, streams, console)


if __name__ == "__main__":
    sys.exit(main())
