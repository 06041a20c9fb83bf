"""Train a SentencePiece BPE tokenizer and save it in Transformers' format."""

import argparse
import sys

from hypermoe_ds.data.tokenizer import train_tokenizer
from hypermoe_ds.process import one_line_errors


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text files (one document each), .jsonl, .jsonl.gz (one document per line), or folders of these",
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="TOKENS", help="number of tokens, including 256 byte tokens"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder; must be empty or not exist")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="JSONL field that contains the text")
    parser.add_argument("--strict", action="store_true", help="stop at the first file or line without text")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    report = train_tokenizer(args.input, args.vocab_size, args.output, args.text_field, args.strict)
    print(f"{args.output}: {args.vocab_size:,} tokens, learned from {report.documents:,} documents")
    if report.skipped:
        print(f"warning: skipped {report.describe_skipped()}", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
