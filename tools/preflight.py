"""Check the hosts of a job before it starts.

python tools/preflight.py --hostfile hostfile --config R.yaml --deepspeed_config F.json [section.key=value ...]

The script prints a table of the hosts and measures the bandwidth between them. Each failed check is reported on stderr
in one line with a remedy, and the script exits with code 2. The launch scripts run these checks. With --fit, failing
hosts are excluded, and the exit code is 2 only if no host can train.
"""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hypermoe_ds.cluster.host_report import HostQuery
from hypermoe_ds.cluster.hosts import (
    Host,
    forwarded_environment,
    read_environment,
    read_hostfile,
    rendezvous,
    slurm_hosts,
    this_host,
)
from hypermoe_ds.cluster.preflight import (
    Failure,
    Starter,
    ask_hosts,
    check_hosts,
    check_interconnect,
    fit,
    interconnect_line,
    measure_interconnect,
    table,
)
from hypermoe_ds.errors import UserError
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.run_config import RunConfig, load_run_config
from hypermoe_ds.training.ds_config import load_deepspeed_json, merge

REPOSITORY = Path(__file__).parents[1]
DEEPSPEED_ENVIRONMENT = ".deepspeed_env"


def main() -> None:
    """Query the hosts, check their reports and measure the interconnect."""
    arguments = parse_arguments()
    ds_json = load_deepspeed_json(arguments.deepspeed_config)
    config = load_run_config(arguments.config, arguments.overrides)
    hosts = [] if arguments.dry_run and arguments.slurm else hosts_of(arguments)
    if arguments.fit is None and arguments.slots is None and hosts:
        ranks = sum(host.slots for host in hosts)
        merge(
            ds_json, config.train, config.build_model_config(), config.parallel.expert, ranks
        )  # raises an error if the settings are inconsistent
    if arguments.dry_run:
        return
    starter = Starter(environment_of(arguments.environment), Path.cwd())
    with token_in(Path(config.run.dir)) as token:
        files = (arguments.config, arguments.deepspeed_config, arguments.overrides, data_files(config))
        query = HostQuery(config.run.dir, token, *files)
        answers = ask_hosts(hosts, query, starter)
    print(table(answers), flush=True)
    passed = without_failing(hosts, check_hosts(answers, query, needed_gib(config)), arguments.fit is not None)
    interconnect = measure_interconnect(passed, starter, *rendezvous(passed, os.environ), arguments.mebibytes)
    print(interconnect_line(interconnect, passed, arguments.mebibytes), flush=True)
    passed = without_failing(
        passed, check_interconnect(interconnect, passed, arguments.least), arguments.fit is not None
    )
    if arguments.fit is not None:
        write_fit(arguments.fit, hosts, passed, config)


def without_failing(hosts: Sequence[Host], failures: Sequence[Failure], may_exclude: bool) -> list[Host]:
    """Print the failures and return the hosts that passed; exit if failed hosts may not be excluded."""
    for failure in failures:
        print(f"error: {' '.join(str(failure.error).split())}", file=sys.stderr)
    failed = {failure.host for failure in failures}
    passed = [host for host in hosts if host not in failed]
    if failures and (not may_exclude or not passed or None in failed):
        sys.exit(2)
    return passed


def write_fit(path: Path, hosts: Sequence[Host], passed: Sequence[Host], config: RunConfig) -> None:
    """Print the hosts that can train and the overrides that they need, and write both to `path`."""
    train, experts = config.train, config.build_model_config().num_experts
    found = fit(passed, train.global_batch_size, train.micro_batch_size, config.parallel.expert, experts)
    fewer = len(found.hosts) < len(hosts)
    overrides = [f"parallel.expert={found.expert}"] if fewer else []
    names = ", ".join(host.name for host in found.hosts)
    print(f"{len(found.hosts)} of {len(hosts)} hosts can train: {names}", *overrides, flush=True)
    content = {"hosts": [f"{host.name} slots={host.slots}" for host in found.hosts], "overrides": overrides}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def hosts_of(arguments: argparse.Namespace) -> list[Host]:
    """Return the hosts that the command line selects."""
    if arguments.slurm:
        return slurm_hosts(os.environ)
    if arguments.slots is not None:
        import torch

        return this_host(arguments.slots, torch.cuda.device_count())
    return read_hostfile(arguments.hostfile)


def environment_of(file: Path | None) -> dict[str, str]:
    """Return the environment variables of a job on the hosts, with this checkout first in PYTHONPATH."""
    given = forwarded_environment(REPOSITORY / "launch/forwarded_environment.txt", os.environ)
    for own in [file] if file else [Path.home() / DEEPSPEED_ENVIRONMENT, Path(DEEPSPEED_ENVIRONMENT)]:
        given |= read_environment(own) if file or own.is_file() else {}
    return given | {"PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), given.get("PYTHONPATH"))))}


def data_files(config: RunConfig) -> list[str]:
    """Return the paths of the token files and the tokenizer."""
    datasets = [*config.data.train, *config.data.valid]
    return [f"{dataset.prefix}.{end}" for dataset in datasets for end in ("idx", "bin")] + [config.data.tokenizer]


@contextmanager
def token_in(folder: Path) -> Iterator[str]:
    """Create a temporary file in the run folder and yield its name. Only hosts that share the storage see the file."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    token = folder / f".preflight-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        problem = f"cannot be written to ({error.strerror})"
        raise UserError(f"run.dir={folder}", problem, "choose another run.dir") from None
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)
        for path in made:
            path.rmdir()


def needed_gib(config: RunConfig) -> float:
    """Return the disk space, in GiB, that the run's checkpoints still need.

    A run needs space for the checkpoints that it keeps and for one that it is writing. A checkpoint takes 12 bytes per
    parameter.
    """
    from hypermoe_ds.checkpoint.directory import saved_steps
    from hypermoe_ds.checkpoint.run_folder import RunFolder

    checkpoint_gib = 12 * config.build_model_config().parameter_counts().total / 2**30
    existing = len(saved_steps(RunFolder(Path(config.run.dir)).checkpoints))
    return checkpoint_gib * max(1, config.checkpoint.keep_last + 1 - existing)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, default=Path("hostfile"), help="file with lines 'host slots=RANKS'")
    where.add_argument("--slots", metavar="N", help="check only this machine, for N ranks ('gpu': one rank per GPU)")
    where.add_argument("--slurm", action="store_true", help="check the hosts of the current Slurm job")
    parser.add_argument("--environment", type=Path, metavar="FILE",
                        help="NAME=VALUE lines to set on the hosts (default: the .deepspeed_env files)")  # fmt: skip
    parser.add_argument("--mebibytes", type=int, default=64, metavar="N", help="MiB that each rank sends (default: 64)")
    parser.add_argument("--least", type=float, default=0.0, metavar="X",
                        help="minimum GB/s between each pair of hosts (default: 0)")  # fmt: skip
    parser.add_argument("--fit", type=Path, metavar="FILE",
                        help="exclude failing hosts; write the other hosts and their overrides to FILE")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check only the settings and the hostfile")
    parser.add_argument("--config", required=True, metavar="R.yaml", help="the recipe of the job")
    parser.add_argument(
        "--deepspeed_config",
        required=True,
        metavar="F.json",
        help="DeepSpeed configuration, such as ds_configs/zero1.json",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
    arguments = parser.parse_intermixed_args()
    if arguments.mebibytes < 1:
        raise UserError(f"--mebibytes={arguments.mebibytes}", "is too little data for a measurement", "give 1 or more")
    if not arguments.least >= 0:  # also true for NaN
        raise UserError(f"--least={arguments.least}", "is not a bandwidth in GB/s", "give 0 or more")
    return arguments


if __name__ == "__main__":
    with one_line_errors():
        main()
