"""Command-line arguments of the tools that read text."""

import argparse

from hypermoe_ds.data.inputs import READABLE_KINDS, Kind
from hypermoe_ds.data.readers import ReadOptions


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select inputs and describe how documents are read."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"files and folders: {READABLE_KINDS}. A text file is one document",
    )
    parser.add_argument(
        "--as",
        dest="unknown_as",
        type=Kind,
        choices=(Kind.TEXT, Kind.JSON_LINES),
        help="format of files with an unknown suffix; without this option, such files are an error",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="text field of JSON Lines, Parquet and datasets; a.b is field b inside field a (default: text)",
    )
    parser.add_argument(
        "--document-separator",
        type=separator,
        metavar="TEXT",
        help="string between the documents of a text file, such as \\n\\n; without it, a text file is one document",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first file or record that has no usable text"
    )


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    """Return the reading options that the parsed arguments contain."""
    return ReadOptions(arguments.text_field, arguments.document_separator, arguments.strict)


def separator(text: str) -> str:
    """Return a separator after replacing `\\n`, `\\t` and `\\f` with the characters that they stand for.

    Raises:
        argparse.ArgumentTypeError: the text is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty text separates no documents; omit the option")
    return text.replace("\\n", "\n").replace("\\t", "\t").replace("\\f", "\f")


def percentage(text: str) -> float:
    """Convert a percentage such as ``0.5%`` to a fraction.

    Raises:
        argparse.ArgumentTypeError: the text is not a percentage.
    """
    try:
        number, sign, rest = text.partition("%")
        if not sign or rest:
            raise ValueError
        return float(number) / 100
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a percentage such as 0.5%") from None
