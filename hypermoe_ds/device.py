"""Find out whether this process computes on a GPU."""

import os

import torch


def uses_gpu() -> bool:
    """Return whether DeepSpeed's accelerator is a GPU: a GPU exists, and DS_ACCELERATOR does not select the CPU.

    This function does not import DeepSpeed, because the import takes seconds.
    """
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
