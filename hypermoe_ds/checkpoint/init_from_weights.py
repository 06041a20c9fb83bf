"""Write the run folder of a new run that starts from existing weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from hypermoe_ds.checkpoint.directory import name_latest, step_name
from hypermoe_ds.checkpoint.expert_layout import training_weights
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import write_weights
from hypermoe_ds.data.tokenizer import copy_tokenizer
from hypermoe_ds.files import check_output, check_room, scratch_folder
from hypermoe_ds.modeling import HyperMoEConfig

_SHARD_BYTES = 10**8  # size of a shard, which is held in memory while it is written


def init_from_weights(
    output: Path,
    model_config: HyperMoEConfig,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: Path,
    settings: Mapping[str, Any],
    state: Mapping[str, Any],
) -> RunFolder:
    """Write a run folder with a checkpoint of step 0, atomically.

    Args:
        output: the run folder; it must be empty or not exist.
        model_config: configuration of the model.
        weights: tensors of the Transformers model.
        tokenizer: folder of the model's tokenizer.
        settings: the known settings of the recipe: `model` and `train.precision`.
        state: training state before the first step.

    Raises:
        UserError: the output exists and is not empty, there is too little disk space, or there is no tokenizer.
    """
    check_output(output)
    with scratch_folder(output) as scratch:
        check_room(output, scratch, 4 * model_config.parameter_counts().total)
        run = RunFolder(scratch / output.name)
        copy_tokenizer(tokenizer, run.tokenizer)
        run.write_model(model_config)
        section = yaml.safe_dump({"model": settings["model"]}, sort_keys=False)
        run.model_section.write_text(section, encoding="utf-8")
        checkpoint = run.checkpoints / step_name(0)
        checkpoint.mkdir(parents=True)
        write_weights(checkpoint, training_weights(weights), dict(settings), {"run": dict(state)}, _SHARD_BYTES)
        name_latest(run.checkpoints, 0)
        if output.exists():
            output.rmdir()
        run.path.rename(output)
    return RunFolder(output)
