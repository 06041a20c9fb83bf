"""Log metrics to Weights & Biases, grouped by page."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hypermoe_ds.files import write_atomically
from hypermoe_ds.monitor.metrics import metric_of


class WeightsAndBiases:
    """Log to a W&B run, which resumed launches continue.

    Args:
        project: W&B project.
        run_dir: the run folder. The W&B run has the name of this folder. A file named `wandb_id` stores
            the ID of the W&B run.
    """

    def __init__(self, project: str, run_dir: Path) -> None:
        self._wandb: Any = import_module("wandb")
        path = run_dir / "wandb_id"
        run_id = path.read_text(encoding="utf-8").strip() if path.is_file() else None
        # Without "allow", a resumed launch would start a second W&B run.
        self._run = self._wandb.init(
            project=project, name=run_dir.resolve().name, id=run_id, resume="allow", dir=str(run_dir)
        )
        write_atomically(path, f"{self._run.id}\n")

    def metrics(self, step: int, values: Mapping[str, float], loads: Mapping[str, Sequence[float]]) -> None:
        """Log metric values, and the expert loads of each layer as a histogram, under the keys of metrics.jsonl.

        A resumed run may repeat steps. W&B ignores steps that it already has, so no chart shows a step twice.
        """
        histograms = {key: self._wandb.Histogram(list(load)) for key, load in loads.items()}
        self._run.log({_by_page(key): value for key, value in {**values, **histograms}.items()}, step=step)

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Log prompts and their continuations as a table."""
        rows = [[step, prompt, text] for prompt, text in samples]
        self._run.log({"samples": self._wandb.Table(["step", "prompt", "text"], rows)}, step=step)

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Set the configuration of the W&B run."""
        self._run.config.update(dict(settings), allow_val_change=True)


def _by_page(key: str) -> str:
    metric = metric_of(key)
    return key if metric is None else f"{metric.page}/{key}"
