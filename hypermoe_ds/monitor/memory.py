"""Measure memory usage."""

import resource

import torch
import torch.distributed

from hypermoe_ds.device import uses_gpu


class MemoryMeter:
    """Measure the peak memory over all ranks, in GiB."""

    def __init__(self) -> None:
        self._peak = 0.0

    def read(self) -> dict[str, float]:
        """Return the peak memory since the last call and since the launch (collective).

        On a GPU, the values are the memory allocated for tensors and the memory reserved by PyTorch. On CPU, the only
        value is the peak of resident memory since the process began.
        """
        if uses_gpu():
            names = ["memory_allocated_gib", "memory_reserved_gib"]
            bytes_2 = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
            torch.cuda.reset_peak_memory_stats()
            largest = dict(zip(names, _largest_of_ranks([size / 2**30 for size in bytes_2], "cuda"), strict=True))
            self._peak = max(self._peak, largest["memory_allocated_gib"])
            return {**largest, "peak_memory_gib": self._peak}
        [peak] = _largest_of_ranks([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20], "cpu")
        return {"peak_memory_gib": peak}


def _largest_of_ranks(values: list[float], device: str) -> list[float]:
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return list(map(float, largest.tolist()))
