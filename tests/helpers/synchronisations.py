"""Operations that would make the host wait for a GPU, seen on a CPU."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# bincount sizes its result by the largest value. lift_fresh is a number of the host's on its way into a tensor.
_WAITING = ("_local_scalar_dense", "nonzero", "_unique", "unique_", "bincount", "masked_select", "lift_fresh")


class Synchronisations(TorchDispatchMode):
    """Collects the names of the operations inside that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(_WAITING):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
