"""Read a run's model from a checkpoint, tensor by tensor, in one process.

Shape legend: D hidden size, N experts, F expert width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hypermoe_ds.checkpoint.directory import find_checkpoint
from hypermoe_ds.checkpoint.expert_layout import training_shapes, training_view
from hypermoe_ds.checkpoint.hf_folder import checked_shapes, short
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import CheckpointReader
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM, meta_model

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MAPPED_BYTES = 2**26  # files are memory-mapped, and closed after this many bytes have been read


class CheckpointWeights:
    """Tensors of the Transformers model, read from a checkpoint on demand.

    Args:
        reader: the checkpoint.
        config: configuration of the run's model.
        dtype: precision of the tensors; None uses the run's precision, so that the tensors are bitwise identical to
            those in training.

    Attributes:
        config: configuration of the run's model.
        dtype: precision of the tensors.
        shapes: names and shapes of the tensors, in model order.

    Raises:
        UserError: the checkpoint belongs to a different model.
    """

    def __init__(
        self, reader: CheckpointReader, model_config: HyperMoEConfig, dtype: torch.dtype | None = None
    ) -> None:
        self.config = model_config
        self.dtype = dtype or _precision_of(reader)
        self.shapes = checked_shapes(reader.folder, model_config, reader.manifest.tensors)
        self._reader = reader
        self._mapped = 0
        stored = {name: entry.shape for name, entry in reader.manifest.tensors.items()}
        for name, shape in self.shapes.items():
            for part, of_part in training_shapes(name, shape).items():
                if stored.get(part) != tuple(of_part):
                    found = f"is {list(stored[part])}" if part in stored else "is missing"
                    raise _broken(reader.folder, f"{part} {found}, but {list(of_part)} in the run's model")

    def read(self, name: str) -> Tensor:
        """Read a tensor in `dtype`. Stacked experts are read one by one, so that only one expert is in memory in fp32.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        shape = self.shapes[name]
        tensor = torch.empty(shape, dtype=self.dtype)
        try:
            for part, of_part in training_shapes(name, shape).items():
                self._read_into(training_view(tensor, part), part, of_part)
        except (OSError, SafetensorError) as error:
            raise _broken(self._reader.folder, str(error)) from None
        return tensor

    def _read_into(self, target: Tensor, part: str, shape: torch.Size) -> None:
        """Read a 3-D tensor expert by expert, and any other tensor in one piece."""
        size = shape.numel()
        rows = len(shape) == 3
        step = size // shape[0] if rows else size
        for index, start in enumerate(range(0, size, step)):
            piece = self._reader.read_range(part, start, start + step)
            (target[index] if rows else target).copy_(piece.view(shape[1:] if rows else shape))
            self._mapped += piece.nbytes
            if self._mapped > _MAPPED_BYTES:
                self._reader.release()
                self._mapped = 0


@contextmanager
def open_weights(
    run: RunFolder, step: int | None = None, dtype: torch.dtype | None = None
) -> Iterator[CheckpointWeights]:
    """Open the tensors of a run's model.

    Args:
        run: the run folder.
        step: step of the checkpoint; None selects the newest checkpoint.
        dtype: precision of the tensors; None uses the run's precision.

    Raises:
        UserError: the checkpoint does not exist, is damaged or belongs to a different model.
    """
    config = run.model_config()
    with CheckpointReader(find_checkpoint(run.checkpoints, step)) as reader:
        yield CheckpointWeights(reader, config, dtype)


def load_model(run: RunFolder, step: int | None = None) -> HyperMoEForCausalLM:
    """Load a run's model in the run's precision; the weights are bitwise identical to those in training.

    Args:
        run: the run folder.
        step: step of the checkpoint; None selects the newest checkpoint.

    Raises:
        UserError: the checkpoint does not exist, is damaged or belongs to a different model.
    """
    with open_weights(run, step) as weights:
        return model_of(weights.config, {name: weights.read(name) for name in weights.shapes})


def model_of(model_config: HyperMoEConfig, tensors: dict[str, Tensor]) -> HyperMoEForCausalLM:
    """Build a Transformers model from named tensors without copying them."""
    model = meta_model(model_config)
    if model_config.tie_word_embeddings:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model


def _precision_of(reader: CheckpointReader) -> torch.dtype:
    """Return the precision in which the run trained."""
    train = reader.manifest.settings.get("train")
    precision = train.get("precision") if isinstance(train, dict) else None
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise _broken(reader.folder, f"train.precision={short(precision)} in its manifest")
    return PRECISIONS[precision]


def _broken(checkpoint: Path, problem: str) -> UserError:
    return UserError(str(checkpoint), f"is not a complete checkpoint of this run ({problem})", "choose another --step")
