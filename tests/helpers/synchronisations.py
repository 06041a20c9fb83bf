"""Detect operations that would make the host wait for a GPU. This works without a GPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# `bincount` reads its largest input value to size the result. `lift_fresh` copies a number to the device.
_WAITING = ("_local_scalar_dense", "nonzero", "_unique", "unique_", "bincount", "masked_select", "lift_fresh")


class _Lists(TorchFunctionMode):
    """Recorder of calls to `tolist` and `numpy`, which dispatch no PyTorch operation on a CPU."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Synchronisations(TorchDispatchMode):
    """Context manager that records operations that would make the host wait for a GPU.

    Attributes:
        seen: names of the recorded operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._lists = _Lists(self.seen)

    def __enter__(self) -> "Synchronisations":
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._lists.__exit__(*failure)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(_WAITING):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
