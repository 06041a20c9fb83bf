"""Start a training job, and start it again after a fault, from its newest checkpoint.

python launch/supervise.py [--max-restarts N] [--window SECONDS] -- deepspeed ... pretrain/train.py --config R.yaml ...
python launch/supervise.py --hostfile H -- bash launch/pdsh.sh --no-preflight --hostfile {hosts} --config R.yaml ...

The second form looks at the hosts of H before each start (tools/preflight.py), and starts on those that pass.
Exit code: 0 when the run is done, 75 when a signal ended it after a checkpoint, else that of the last try.
What ended each try is kept in RUN_DIR/supervisor.jsonl.
"""

import argparse
import os
import sys
from pathlib import Path

from hypermoe_ds.errors import one_line_errors
from hypermoe_ds.supervision.command import TrainingCommand
from hypermoe_ds.supervision.history import Limits
from hypermoe_ds.supervision.hosts import HostChoice
from hypermoe_ds.supervision.supervisor import Supervisor

REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    """Read the command line and supervise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N", help="faults borne in the window (10)")
    parser.add_argument("--window", type=float, default=86400, metavar="SECONDS", help="length of the window (86400)")
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="hosts that may be used; {hosts} in the command: those that pass"
    )
    parser.add_argument("command", nargs="+", help="after --: the training command, without checkpoint.resume")
    arguments = parser.parse_args()
    command = TrainingCommand.read(arguments.command)
    choice = None
    if arguments.hostfile is not None:
        preflight = [sys.executable, str(REPOSITORY / "tools/preflight.py")]
        usual = os.environ.get("HYPERMOE_DEEPSPEED_CONFIG", str(REPOSITORY / "ds_configs/zero1.json"))
        choice = HostChoice(arguments.hostfile, command, preflight, usual)
    limits = Limits(arguments.max_restarts, arguments.window)
    sys.exit(Supervisor(command, limits, choice).run())


if __name__ == "__main__":
    with one_line_errors():
        main()
