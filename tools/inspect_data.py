"""Inspect token files or the training samples of a run.

With a PREFIX, report the content of token files, decode a document, plot the lengths of the documents, or verify the
files against the hashes in PREFIX.json. With a run folder, list the samples of a step or decode a sample. The exit code
is 2 if a file is not the one that tools/preprocess_data.py wrote.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from hypermoe_ds.errors import UserError
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.progress import Progress


def main() -> None:
    """Print what the arguments ask for."""
    arguments = parse_arguments()
    if Path(arguments.path).is_dir():
        inspect_run(arguments)
    else:
        inspect_token_files(arguments)


def inspect_token_files(arguments: argparse.Namespace) -> None:
    """Report the content of token files, and do what the options ask for."""
    refuse(arguments, "step", "sample", remedy="give a run folder instead of a prefix")
    if arguments.plot and find_spec("matplotlib") is None:
        raise UserError("--plot", "matplotlib is not installed", "bash launch/setup.sh bench")
    from hypermoe_ds.data.token_report import bytes_to_verify, document_text, plot_lengths, report_lines, verify

    prefix = arguments.path
    print(*report_lines(prefix), sep="\n")
    if arguments.document is not None:
        text = document_text(prefix, arguments.document, arguments.tokenizer)
        print(f"document {arguments.document}:", text, sep="\n")
    if arguments.plot:
        plot_lengths(prefix, arguments.plot)
        print(f"plotted the lengths of the documents in {arguments.plot}")
    if arguments.verify:
        with Progress("verify", "B", bytes_to_verify(prefix)) as bar:
            verify(prefix, bar.update)
        print(f"verified: both files are the ones that {prefix}.json describes")


def inspect_run(arguments: argparse.Namespace) -> None:
    """List the samples of a step, or decode a sample."""
    refuse(arguments, "verify", "document", "tokenizer", "plot", remedy="give a prefix instead of a run folder")
    if arguments.step is None and arguments.sample is None:
        raise UserError(arguments.path, "is a folder", "give a prefix, or add --step or --sample for a run folder")
    from hypermoe_ds.checkpoint.run_folder import RunFolder
    from hypermoe_ds.run_samples import RunSamples

    run = RunSamples.of(RunFolder(Path(arguments.path)))
    if arguments.step is not None:
        print(*map(run.describe, run.of_step(arguments.step)), sep="\n")
    if arguments.sample is not None:
        print(*run.text(arguments.sample), sep="\n")


def refuse(arguments: argparse.Namespace, *options: str, remedy: str) -> None:
    """Refuse options that do not fit the path.

    Raises:
        UserError: one of the options is given.
    """
    for option in options:
        if getattr(arguments, option) not in (None, False):
            raise UserError(f"--{option}", f"does not apply to {arguments.path}", remedy)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="PATH", help="path of token files, without .bin and .idx, or a run folder")
    parser.add_argument("--verify", action="store_true", help="read both files and compare their SHA-256")
    parser.add_argument("--document", type=int, metavar="N", help="also print document N as text, counted from 0")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder (default: the one in PREFIX.json)")
    parser.add_argument("--plot", metavar="FILE.png", help="plot a histogram of the lengths (needs matplotlib)")
    parser.add_argument("--step", type=int, metavar="N", help="list the samples of optimizer step N of a run")
    parser.add_argument("--sample", type=int, metavar="N", help="print sample N of a run as text")
    return parser.parse_args()


if __name__ == "__main__":
    with one_line_errors():
        main()
