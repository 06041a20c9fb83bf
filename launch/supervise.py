"""Start a training job, and start it again after a fault, from its newest checkpoint.

python launch/supervise.py [--max-restarts N] [--window SECONDS] -- deepspeed ... pretrain/train.py --config R.yaml ...

Exit code: 0 when the run is done, 75 when a signal ended it after a checkpoint, else that of the last try.
What ended each try is kept in RUN_DIR/supervisor.jsonl.
"""

import argparse
import sys

from hypermoe_ds.errors import one_line_errors
from hypermoe_ds.supervision.history import Limits
from hypermoe_ds.supervision.supervisor import Supervisor


def main() -> None:
    """Read the command line and supervise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N", help="faults borne in the window (10)")
    parser.add_argument("--window", type=float, default=86400, metavar="SECONDS", help="length of the window (86400)")
    parser.add_argument(
        "--hosts-command", metavar="COMMAND", help="prints a hostfile; run before each try, read as {hosts}"
    )
    parser.add_argument("command", nargs="+", help="after --: the training command, without checkpoint.resume")
    arguments = parser.parse_args()
    limits = Limits(arguments.max_restarts, arguments.window)
    sys.exit(Supervisor(arguments.command, limits, arguments.hosts_command).run())


if __name__ == "__main__":
    with one_line_errors():
        main()
