"""Check that the ranks' replicas of the parameters are still bitwise identical."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hypermoe_ds.errors import MachineError
from hypermoe_ds.parallel.control_group import ControlGroup

_CHUNK = 1 << 22
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaCheck:
    """Compare the replicas of each parameter; experts are compared among the ranks that hold the same experts.

    ZeRO 3 partitions all parameters except small ones, so only the small ones have replicas to compare.

    Args:
        engine: the DeepSpeed engine.
        ranks: group that exchanges the checksums.
        expert_parallel: number of ranks that share one copy of the experts.
    """

    def __init__(self, engine: Any, ranks: ControlGroup, expert_parallel: int) -> None:
        self._module = engine.module
        self._ranks = ranks
        self._expert_parallel = expert_parallel

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Compare all replicas (collective).

        Raises:
            MachineError: replicas differ; the error names the parameter and the ranks that differ from the majority.
        """
        sums = [checksum(parameter) for _, parameter in self._replicated()]
        of_ranks = self._ranks.gather(torch.stack(sums).tolist() if sums else [])
        for number, (name, parameter) in enumerate(self._replicated()):
            shared = getattr(parameter, "allreduce", True)  # DeepSpeed sets this attribute to False on experts
            owners = 1 if shared else self._expert_parallel
            for first in range(owners):
                found = {rank: tuple(of_ranks[rank][number]) for rank in range(first, len(of_ranks), owners)}
                if len(set(found.values())) > 1:
                    raise MachineError(_difference(name, found, step))

    def _replicated(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            if getattr(parameter, "ds_persist", True):
                yield name, parameter


def checksum(parameter: Tensor) -> Tensor:
    """Return a plain and a position-weighted sum over the words of a tensor, as an int64 tensor [2].

    The plain sum detects a changed word. The weighted sum also detects two swapped words.
    """
    words = parameter.detach().contiguous().view(-1).view(_WORDS[parameter.element_size()])
    total_2 = torch.zeros(2, dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].long()
        positions = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        total_2 += torch.stack([part.sum(), (part * positions).sum()])
    return total_2


def _difference(name: str, found: dict[int, tuple[int, ...]], step: int) -> str:
    [(usual, holders), *_] = Counter(found.values()).most_common()
    others = [rank for rank, value in found.items() if value != usual]
    if 2 * holders > len(found):
        ranks = f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
        problem = f"{ranks} differs from the majority" if len(others) == 1 else f"{ranks} differ from the majority"
    else:
        problem = f"ranks {', '.join(map(str, found))} disagree, and no value has a majority"
    return (
        f"the copies of {name} differ after step {step}: {problem}; "
        "check the memory of that host and resume from the last checkpoint"
    )
