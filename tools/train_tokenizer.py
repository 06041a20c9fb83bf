"""Train a SentencePiece BPE tokenizer and save it in Transformers' format."""

import argparse
import sys

from hypermoe_ds.data.arguments import add_input_arguments, read_options
from hypermoe_ds.data.tokenizer import train_tokenizer
from hypermoe_ds.process import one_line_errors


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_input_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="TOKENS", help="number of tokens, including 256 byte tokens"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder; must be empty or not exist")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    report = train_tokenizer(args.input, args.vocab_size, args.output, read_options(args), args.unknown_as)
    print(f"{args.output}: {args.vocab_size:,} tokens, learned from {report.documents:,} documents")
    if report.rejected:
        print(f"warning: rejected {report.describe_rejected()}", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
