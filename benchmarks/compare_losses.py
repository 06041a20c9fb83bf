"""Compare the losses of one model in two runs of train_step.py --repeat-batch, such as an fp32 and a bf16 run."""

import argparse
import json
from pathlib import Path

from hypermoe_ds.errors import UserError
from hypermoe_ds.process import one_line_errors


def main() -> None:
    """Compare the losses and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="FILE", help="JSON file written by train_step.py --json")
    parser.add_argument(
        "--side", default="hypermoe", help="side of the comparison, one of those of train_step.py (default: hypermoe)"
    )
    parser.add_argument("--tolerance", type=float, default=0.01, help="maximum relative difference (default: 0.01)")
    arguments = parser.parse_args()

    first, second = (losses(path, arguments.side) for path in arguments.runs)
    if len(first) != len(second):
        raise UserError(
            str(arguments.runs[1]), f"has {len(second)} steps instead of {len(first)}", "run both with the same --steps"
        )
    differences = [abs(a - b) / abs(a) for a, b in zip(first, second, strict=True)]
    print("| step | loss, nats per token | loss, nats per token | relative difference |\n| ---: | ---: | ---: | ---: |")
    for step, (a, b, difference) in enumerate(zip(first, second, differences, strict=True), 1):
        print(f"| {step} | {a:.4f} | {b:.4f} | {difference:.5f} |")
    if not all(difference <= arguments.tolerance for difference in differences):  # also true for NaN
        raise UserError(
            f"largest relative difference {max(differences):.5f}",
            f"is above --tolerance {arguments.tolerance}",
            "look for the cause",
        )


def losses(path: Path, side: str) -> list[float]:
    """Read the losses of the measured steps, in nats per token."""
    try:
        found: list[float] = json.loads(path.read_text(encoding="utf-8"))["sides"][side]["losses"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), f"has no losses of {side} ({error})", "run train_step.py --json") from None
    return found


if __name__ == "__main__":
    with one_line_errors():
        main()
