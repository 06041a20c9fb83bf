"""Reads a run's model out of its checkpoint, on one process and whatever the ranks were."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.checkpoint.shards import CheckpointReader
from hypermoe_ds.checkpoint.store import find_checkpoint
from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEForCausalLM

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_EXPERT = re.compile(r"(?P<block>.*\.experts)\.(?P<part>w[123])(?:\.(?P<index>\d+))?")


def load_model(run: RunFolder, step: int | None = None) -> HyperMoEForCausalLM:
    """The model of a run as it was trained: its weights bit for bit, in the precision of the run.

    Args:
        run: the run folder.
        step: which checkpoint; None takes the newest.

    Raises:
        UserError: no such checkpoint, or one that is not whole.
    """
    config = run.model_config()
    checkpoint = find_checkpoint(run.checkpoints, step)
    model: HyperMoEForCausalLM = HyperMoEForCausalLM(config).to(_precision(run))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    try:
        weights = join_experts(_read_weights(checkpoint))
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict({name: tensor.view(shapes.get(name, tensor.shape)) for name, tensor in weights.items()})
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(str(checkpoint), f"is not a whole checkpoint ({error})", "choose another --step") from None
    model.eval()
    return model


def _precision(run: RunFolder) -> torch.dtype:
    ds_config = json.loads(run.ds_config.read_text())
    return next((dtype for name, dtype in _PRECISIONS.items() if ds_config[name]["enabled"]), torch.float32)


def _read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights under the training model's names, in fp32."""
    with CheckpointReader(checkpoint) as reader:
        return {name: reader.read(name) for name in reader.manifest.tensors}


def join_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the experts of all ranks together, under the names of the Transformers model.

    Args:
        weights: `BLOCK.experts.w1|w2|w3` [N, ...] or, cut by expert, `BLOCK.experts.w1.INDEX` [...].
            w1 is the gate, w3 the up and w2 the down projection.

    Returns:
        All weights, with `BLOCK.experts.gate_up_proj` [N, 2F, D] and `.down_proj` [N, D, F].
    """
    joined: dict[str, Tensor] = {}
    parts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in weights.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            joined[name] = tensor
        elif match["index"] is None:
            parts.setdefault(match["block"], {})[match["part"]] = dict(enumerate(tensor))
        else:
            parts.setdefault(match["block"], {}).setdefault(match["part"], {})[int(match["index"])] = tensor
    for block, part in parts.items():
        w1, w2, w3 = (torch.stack([part[name][i] for i in range(len(part[name]))]) for name in ("w1", "w2", "w3"))
        joined[f"{block}.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        joined[f"{block}.down_proj"] = w2
    return joined
