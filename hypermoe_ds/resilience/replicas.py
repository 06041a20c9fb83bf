"""Whether the ranks' copies of the parameters are still the same, to the bit."""

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
    """Compares what the ranks hold alike: parameters, experts among the ranks that hold the same ones.

    Under ZeRO-3 parameters are cut over the ranks and have no copies; only the small ones that every rank keeps
    whole are compared.

    Args:
        engine: the DeepSpeed engine.
        ranks: exchange the sums.
        expert_parallel: ranks that share one copy of the experts.
    """

    def __init__(self, engine: Any, ranks: ControlGroup, expert_parallel: int) -> None:
        self._module = engine.module
        self._ranks = ranks
        self._expert_parallel = expert_parallel

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Compare (collective).

        Raises:
            MachineError: a copy differs; names the parameter and the ranks that disagree with most.
        """
        sums = [checksum(parameter) for _, parameter in self._copies()]
        of_ranks = self._ranks.gather(torch.stack(sums).tolist() if sums else [])
        for number, (name, parameter) in enumerate(self._copies()):
            shared = getattr(parameter, "allreduce", True)  # DeepSpeed's mark of what expert parallelism cuts
            places = 1 if shared else self._expert_parallel
            for place in range(places):
                found = {rank: tuple(of_ranks[rank][number]) for rank in range(place, len(of_ranks), places)}
                if len(set(found.values())) > 1:
                    raise MachineError(_difference(name, found, step))

    def _copies(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            if getattr(parameter, "ds_persist", True):
                yield name, parameter


def checksum(parameter: Tensor) -> Tensor:
    """Two sums over the words of a tensor, [2] in int64: any change of one word shows, and any two exchanged."""
    words = parameter.detach().contiguous().view(-1).view(_WORDS[parameter.element_size()])
    total_2 = torch.zeros(2, dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        total_2 += torch.stack([part.sum(), (part * places).sum()])
    return total_2


def _difference(name: str, found: dict[int, tuple[int, ...]], step: int) -> str:
    [(usual, holders), *_] = Counter(found.values()).most_common()
    others = [rank for rank, value in found.items() if value != usual]
    if 2 * holders > len(found):
        describe = f"on rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} it is not what the others have"
    else:
        describe = f"ranks {', '.join(map(str, found))} disagree, and no value has a majority"
    return (
        f"the copies of {name} differ after step {step}: {describe}; "
        "look at the memory of that host and start again from the last checkpoint"
    )
