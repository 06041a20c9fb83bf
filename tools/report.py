"""Write a self-contained HTML page that shows and compares runs.

python tools/report.py RUN_DIR [RUN_DIR ...] --output report.html
"""

import argparse
from pathlib import Path

from hypermoe_ds.errors import UserError
from hypermoe_ds.files import write_atomically
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.report.page import bins_per_run, build_page
from hypermoe_ds.report.reading import labels, read_run


def main() -> None:
    """Read the runs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="run folders (run.dir)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the HTML page to write")
    arguments = parser.parse_args()
    if arguments.output.is_dir():
        raise UserError(f"--output {arguments.output}", "is a folder", "give a file such as report.html")
    if not arguments.output.parent.is_dir():
        raise UserError(f"--output {arguments.output}", "is in a folder that does not exist", "create the folder first")
    bins = bins_per_run(len(arguments.runs))
    runs = [read_run(path, name, bins) for path, name in zip(arguments.runs, labels(arguments.runs), strict=True)]
    page = build_page(runs)
    try:
        write_atomically(arguments.output, page)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError(f"--output {arguments.output}", problem, "choose another file") from None
    print(f"{arguments.output}: {len(page.encode()) / 1e6:.1f} MB, {len(runs)} run{'s' * (len(runs) > 1)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
