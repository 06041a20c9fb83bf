"""Tokenise text into PREFIX.bin, PREFIX.idx and PREFIX.json for training. Under mpirun, all ranks share the work.

After an interruption, the same command continues the job. Rejected files and records are listed in
PREFIX.rejected.jsonl.
"""

import argparse

from hypermoe_ds.data.arguments import add_input_arguments, percentage, read_options
from hypermoe_ds.data.mpi import preprocess_locally_or_with_mpi
from hypermoe_ds.data.preprocess import Job
from hypermoe_ds.process import one_line_errors


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_input_arguments(parser)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the output files, without suffix")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (default: 1)")
    parser.add_argument(
        "--max-rejected",
        type=percentage,
        default="1%",
        metavar="SHARE",
        help="fail if a larger share of files and records is rejected (default: 1%%)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files at the output")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    job = Job(
        inputs=args.input,
        tokenizer=args.tokenizer,
        output=args.output,
        workers=args.workers,
        options=read_options(args),
        unknown_as=args.unknown_as,
        max_rejected=args.max_rejected,
        overwrite=args.overwrite,
    )
    summary = preprocess_locally_or_with_mpi(job)
    if summary is not None:
        print(summary)


if __name__ == "__main__":
    with one_line_errors():
        main()
