"""Report the contents of a run's checkpoint or a Hugging Face folder, or compare two folders.

The exit code is 1 if a tensor contains NaN or Inf.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from hypermoe_ds.files import check_input
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.progress import Progress


def main() -> None:
    """Inspect the folders and print the reports."""
    arguments = parse_arguments()
    paths = [path for path in (arguments.checkpoint, arguments.compare) if path is not None]
    for path in paths:
        check_input(path)
    from hypermoe_ds.checkpoint.run_folder import check_step
    from hypermoe_ds.inspection.differences import compare, elements_to_compare
    from hypermoe_ds.inspection.report import difference_lines, inspection_lines, write_json
    from hypermoe_ds.inspection.statistics import elements_to_inspect, inspect
    from hypermoe_ds.inspection.tensor_readers import open_tensor_reader

    check_step(arguments.step, paths)
    with ExitStack() as stack:
        readers = [stack.enter_context(open_tensor_reader(path, arguments.step)) for path in paths]
        pairs = [(readers[0], readers[1])] if len(readers) == 2 else []
        elements = sum(map(elements_to_inspect, readers)) + sum(elements_to_compare(*pair) for pair in pairs)
        with Progress("read", "elements", elements) as bar:
            inspections = [inspect(reader, bar.update) for reader in readers]
            differences = [compare(*pair, bar.update) for pair in pairs]

    for inspection in inspections:
        print(*inspection_lines(inspection), "", sep="\n")
    for difference in differences:
        print(*difference_lines(difference), sep="\n")
    if arguments.json:
        write_json(arguments.json, inspections, differences)
    sys.exit(1 if any(inspection.not_finite() for inspection in inspections) else 0)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="run folder, checkpoint folder or Hugging Face folder",
    )
    parser.add_argument("--compare", type=Path, metavar="DIR", help="second folder, which is compared with the first")
    parser.add_argument(
        "--step", type=int, metavar="N", help="optimizer step of a run folder's checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all statistics, including those of each tensor, to this file"
    )
    return parser.parse_args()


if __name__ == "__main__":
    with one_line_errors():
        main()
