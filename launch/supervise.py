"""Run a training job and restart it from its newest checkpoint after a fault.

python launch/supervise.py [--max-restarts N] [--window SECONDS] -- deepspeed ... pretrain/train.py --config R.yaml ...
python launch/supervise.py --hostfile H -- bash launch/pdsh.sh --no-preflight --hostfile {hosts} --config R.yaml ...

The second form checks the hosts in H before each attempt (tools/preflight.py) and runs on the hosts that pass.
The exit code is 0 if the run is complete, 75 if a signal stopped it after a checkpoint, and otherwise the exit code of
the last attempt. RUN_DIR/supervisor.jsonl records how each attempt ended.
"""

import argparse
import os
import sys
from pathlib import Path

from hypermoe_ds.cluster.attempts import Limits
from hypermoe_ds.cluster.host_selection import HostSelector
from hypermoe_ds.cluster.supervisor import Supervisor
from hypermoe_ds.cluster.training_command import TrainingCommand
from hypermoe_ds.errors import UserError
from hypermoe_ds.process import one_line_errors

REPOSITORY = Path(__file__).parents[1]


def read_command_line(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options before `--` and return them with the command after it."""
    parser = argparse.ArgumentParser(
        usage="supervise.py [--max-restarts N] [--window SECONDS] [--hostfile FILE] -- COMMAND",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="COMMAND: the training command, without checkpoint.resume",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=10,
        metavar="N",
        help="maximum number of restarts within the window (default: 10)",
    )
    parser.add_argument(
        "--window", type=float, default=86400, metavar="SECONDS", help="length of the window (default: 86400)"
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="available hosts; {hosts} in the command is replaced by the path of a hostfile with the hosts that pass",
    )
    before = words[: words.index("--")] if "--" in words else words
    options, unknown = parser.parse_known_args(before)
    command = words[len(before) + 1 :]
    if not command:
        raise UserError("supervise.py", "`-- COMMAND` is missing", "write -- and the training command last")
    if unknown:
        raise UserError(f"supervise.py: {unknown[0]}", "is not an option", "see --help")
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts {options.max_restarts}", "is negative", "give 0 or more")
    if not options.window > 0:
        raise UserError(f"--window {options.window:g}", "is not positive", "give a time in seconds")
    return options, command


def main() -> None:
    """Supervise the job that the command line describes."""
    options, words = read_command_line(sys.argv[1:])
    command = TrainingCommand.read(words)
    selector = None
    if options.hostfile is not None:
        preflight = [sys.executable, str(REPOSITORY / "tools/preflight.py")]
        default = os.environ.get("HYPERMOE_DEEPSPEED_CONFIG", str(REPOSITORY / "ds_configs/zero1.json"))
        selector = HostSelector(options.hostfile, command, preflight, default)
    limits = Limits(options.max_restarts, options.window)
    sys.exit(Supervisor(command, limits, selector).run())


if __name__ == "__main__":
    with one_line_errors():
        main()
