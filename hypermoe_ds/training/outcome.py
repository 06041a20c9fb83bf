"""Summarise a finished launch for the console, with the next commands to run."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hypermoe_ds.monitor.summary import iterate_records
from hypermoe_ds.monitor.units import duration, readable
from hypermoe_ds.training.launches import Ended

_REPOSITORY = Path(__file__).parents[2]
_DEFAULT_PORT = "29500"
_REASONS = {
    "finished": "the run is finished",
    "stop_at_step": "train.stop_at_step ended this launch",
    "signal": "a signal ended this launch after it saved a checkpoint",
}


def outcome_rows(
    run_dir: Path, ended: Ended, step: int, tokens: int, seconds: float, data: str | None, resume: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the rows of the summary, each as a name and a text.

    Args:
        run_dir: the run folder.
        ended: why the launch ended.
        step: last step of the launch.
        tokens: tokens that the run has consumed.
        seconds: duration of the launch.
        data: prefix of the token files to evaluate on; None without validation data.
        resume: the command that resumes the run.
    """
    root = _repository()
    folder = shlex.quote(str(run_dir))
    rows = [
        ("ended", f"{_REASONS[ended]}: step {step:,}, {readable(tokens)} tokens, after {duration(seconds)}"),
        *[("validation", line) for line in _validation(run_dir)],
    ]
    if ended != "finished":
        rows.append(("resume", shlex.join(resume)))
    if data is not None:
        rows.append(("evaluate", f"python {root}pretrain/evaluate.py --checkpoint {folder} --data {shlex.quote(data)}"))
    export = shlex.quote(str(run_dir / "hf"))
    return [
        *rows,
        ("export", f"python {root}tools/convert_to_hf.py --checkpoint {folder} --output {export}"),
        ("report", f"python {root}tools/report.py {folder} --output {shlex.quote(str(run_dir / 'report.html'))}"),
    ]


def _repository() -> str:
    """Return the repository's path as a prefix for file names, relative if the working directory is inside it."""
    repository = os.path.relpath(_REPOSITORY) if Path.cwd().is_relative_to(_REPOSITORY) else str(_REPOSITORY)
    return "" if repository == "." else f"{repository}/"


def _validation(run_dir: Path) -> list[str]:
    metrics = run_dir / "metrics.jsonl"
    records = iterate_records(metrics) if metrics.is_file() else ()
    losses = [(record["valid_loss"], record["step"]) for record in records if record.get("valid_loss") is not None]
    if not losses:
        return []
    (last, step), (best, best_step) = losses[-1], min(losses)
    return [f"loss {last:.4f} at step {step:,}; best {best:.4f} at step {best_step:,}"]


def resume_command(
    ranks: int, hosts: int, words: Sequence[str], ended: Ended, variables: Mapping[str, str]
) -> list[str]:
    """Return the command that resumes a run.

    Args:
        ranks: number of ranks.
        hosts: number of hosts; with more than one, the command omits the launcher.
        words: command line of the training script in this launch, starting with the script.
        ended: why the launch ended; after "stop_at_step", the command resets `train.stop_at_step`.
        variables: environment variables of this launch; only launch/local.sh sets HYPERMOE_SCREEN.
    """
    script, *arguments = words
    kept = [word for word in arguments if not word.startswith(("--local_rank", "train.stop_at_step="))]
    if ended == "stop_at_step":
        kept.append("train.stop_at_step=null")  # because the recipe may set it
    if hosts > 1:
        return [script, *kept]
    port = variables.get("MASTER_PORT", _DEFAULT_PORT)
    if "HYPERMOE_SCREEN" in variables:
        own_port = [] if port == _DEFAULT_PORT else ["env", f"MASTER_PORT={port}"]
        return [*own_port, "bash", f"{_repository()}launch/local.sh", "--num_gpus", str(ranks), *kept]
    own_port = [] if port == _DEFAULT_PORT else ["--master_port", port]
    return ["deepspeed", "--log_level", "critical", "--num_gpus", str(ranks), *own_port, script, *kept]
