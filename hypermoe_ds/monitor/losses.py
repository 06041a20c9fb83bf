"""Average the losses of all steps between two log records."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

_LOSSES = {"loss": "lm_loss", "total_loss": "loss", "aux_loss": "aux_loss", "z_loss": "z_loss"}  # metric: attribute


class LossMeter:
    """Sum the losses of every micro-batch, without waiting for the device until `read`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, output: Any) -> None:
        """Add the losses of one forward pass; NaN and infinite losses are ignored in the means."""
        losses = {name: getattr(output, attribute) for name, attribute in _LOSSES.items()}
        self._names = [name for name, loss in losses.items() if loss is not None]  # a dense model has no routing losses
        losses_L = torch.stack([losses[name].detach().double() for name in self._names])
        finite_L = losses_L.isfinite()
        sums_2L = torch.stack([losses_L.masked_fill(~finite_L, 0), finite_L.double()])
        self._sums = sums_2L if self._sums is None else self._sums + sums_2L

    def read(self) -> dict[str, float]:
        """Return the means over micro-batches and ranks since the last call (collective); NaN without finite losses."""
        if self._sums is None:
            raise ValueError("no loss was added since the last read")
        sums_2L, self._sums = self._sums, None
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums_2L)
        return dict(zip(self._names, (sums_2L[0] / sums_2L[1]).tolist(), strict=True))
