"""Code that ranks run to load a sharded exported model, for test_inference_plans.py."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hypermoe_ds.modeling  # noqa: F401 (registers the model)


def load_and_run(folders: list[Path], ids_BS: Tensor, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Load each folder sharded over the ranks.

    Returns:
        For each folder, the logits, the greedy continuation and this rank's shard of the weights.
    """
    results = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()
        split = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        with torch.no_grad():
            logits_BSV = model(input_ids=ids_BS).logits
        text = model.generate(ids_BS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        whole = sum(p.numel() for p in split.values())
        results.append(
            {
                "logits": logits_BSV,
                "text": text,
                "split": sorted(split),
                "share": sum(p.to_local().numel() for p in split.values()) / whole,
            }
        )
    return results
