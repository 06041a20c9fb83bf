"""Tokenise text into PREFIX.bin, PREFIX.idx and PREFIX.json for training. Under mpirun, all ranks share the work."""

import argparse

from hypermoe_ds.data.mpi import preprocess_locally_or_with_mpi
from hypermoe_ds.data.preprocess import Job
from hypermoe_ds.process import one_line_errors


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Under mpirun, each rank tokenises whole files, so give at least as many files as ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text files (one document each), .jsonl, .jsonl.gz (one document per line), or folders of these",
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the output files, without suffix")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="number of processes that tokenise")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="JSONL field that contains the text")
    parser.add_argument("--strict", action="store_true", help="stop at the first file or line without text")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files at the output")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    job = Job(args.input, args.tokenizer, args.output, args.workers, args.text_field, args.strict, args.overwrite)
    summary = preprocess_locally_or_with_mpi(job)
    if summary is not None:
        print(summary)


if __name__ == "__main__":
    with one_line_errors():
        main()
