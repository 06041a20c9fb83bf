"""Write RUN_DIR/tensorboard: one group of charts per page, one chart per metric, and one line per layer or dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from hypermoe_ds.monitor.metrics import PAGES, metric_of

_PIXELS = 8  # width and height of an expert's square in the image of loads
_OTHER = f"{len(PAGES) + 1}_other"
_BRIGHTEST = 2.0  # ratio of load to mean load that is shown as white; a ratio of 1 is grey


class TensorBoard:
    """Write event files that make TensorBoard show the pages in order.

    TensorBoard sorts groups by name, so the names of groups begin with a number. TensorBoard draws one line per run,
    so each item of a metric, such as an MoE layer, is a TensorBoard run: a subfolder with its own event file.

    Args:
        folder: RUN_DIR/tensorboard.
        run: name of the run.
        resumed_step: step of the checkpoint that the run continues from; TensorBoard drops later steps.
    """

    def __init__(self, folder: Path, run: str, resumed_step: int) -> None:
        self._folder = folder / run
        self._purge_step = resumed_step + 1
        self._writers: dict[str, SummaryWriter] = {}
        # Drop the steps after resumed_step for all items, including those that this launch does not write.
        for path in sorted(self._folder.glob("*/events.*")):
            self._writer(path.parent.name)
        self._writer("")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write metric values, given with the same keys as in metrics.jsonl."""
        for key, value in values.items():
            name, _, item = key.partition("/")
            self._writer(_run_name(item)).add_scalar(f"{_group(name)}/{name}", value, step)

    def loads(self, step: int, load_MN: Tensor) -> None:
        """Write the load of all experts, relative to the mean, as a histogram and as an image of layers and experts."""
        relative_MN = load_MN.float().cpu() * load_MN.shape[1]
        tag = f"{_group('expert_load')}/expert_load_over_mean"
        writer = self._writer("")
        writer.add_histogram(tag, relative_MN, step)
        grey_MN = (relative_MN / _BRIGHTEST * 255).clamp(0, 255).to(torch.uint8).numpy()
        pixels_HW = np.kron(grey_MN, np.ones((_PIXELS, _PIXELS), np.uint8))
        writer.add_image(f"{tag}_by_layer_and_expert", pixels_HW, step, dataformats="HW")

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write Markdown texts under their names."""
        for name, text in texts.items():
            self._writer("").add_text(name, text, step)

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Write prompts and their continuations."""
        self.texts(step, {f"sample/{number}": _quoted(*sample) for number, sample in enumerate(samples)})

    def flush(self) -> None:
        """Flush all event files to the operating system, so that no values are lost if the process is killed."""
        for writer in self._writers.values():
            writer.flush()

    def _writer(self, item: str) -> SummaryWriter:
        if item not in self._writers:
            self._writers[item] = SummaryWriter(str(self._folder / item), purge_step=self._purge_step)
        return self._writers[item]


def _group(name: str) -> str:
    metric = metric_of(name)
    return _OTHER if metric is None else f"{list(PAGES).index(metric.page) + 1}_{metric.page}"


def _run_name(item: str) -> str:
    """Return the subfolder of an item; layer numbers have two digits, because TensorBoard sorts runs by name."""
    layer = item.removeprefix("moe_layer_")
    return f"moe_layer_{int(layer):02d}" if layer != item else item.replace("/", "-")


def _quoted(prompt: str, text: str) -> str:
    """Format a prompt and its continuation as Markdown blocks, which show any text verbatim."""
    indented = (part.replace("\n", "\n    ") for part in (prompt, text))
    return "Prompt:\n\n    {}\n\nContinuation:\n\n    {}".format(*indented)
