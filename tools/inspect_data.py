"""Report the content of token files, decode a document, or verify the files against the hashes in PREFIX.json.

The exit code is 2 if a file is not the one that tools/preprocess_data.py wrote.
"""

import argparse

from hypermoe_ds.process import one_line_errors
from hypermoe_ds.progress import Progress


def main() -> None:
    """Print the report, and verify the files if requested."""
    arguments = parse_arguments()
    from hypermoe_ds.data.token_report import bytes_to_verify, document_text, report_lines, verify

    prefix = arguments.prefix
    print(*report_lines(prefix), sep="\n")
    if arguments.document is not None:
        text = document_text(prefix, arguments.document, arguments.tokenizer)
        print(f"document {arguments.document}:", text, sep="\n")
    if arguments.verify:
        with Progress("verify", "B", bytes_to_verify(prefix)) as bar:
            verify(prefix, bar.update)
        print(f"verified: both files are the ones that {prefix}.json describes")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="path of token files, without .bin and .idx")
    parser.add_argument("--verify", action="store_true", help="read both files and compare their SHA-256")
    parser.add_argument("--document", type=int, metavar="N", help="also print document N as text, counted from 0")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder (default: the one in PREFIX.json)")
    return parser.parse_args()


if __name__ == "__main__":
    with one_line_errors():
        main()
