"""Output projection, and its cross-entropy without the logits of all tokens at once.

Shape legend: T tokens, t tokens of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_IGNORED = -100

# Size of a chunk's fp32 logits. Time and peak memory of forward and backward at V = 50304, D = 768, T = 2048 on 2
# cores, without weights and input. fp32: all logits 2.80 s, 1.2 GiB; 32 MiB 2.77, 0.6; 64 MiB 2.80, 0.4; 128 MiB 2.71,
# 0.6. bf16: all logits 1.30 s, 1.0 GiB; 32 MiB 1.57, 0.4; 64 MiB 1.50, 0.4; 128 MiB 1.38, 0.5. Each chunk reads and
# writes the fp32 sum of the weight's gradient.
_CHUNK_BYTES = 128 * 2**20


class LMHead(nn.Linear):
    """Linear map from the hidden state to logits; given labels, it returns the loss instead.

    Args:
        hidden_size: D.
        vocab_size: V.

    Attributes:
        fused_cross_entropy: a kernel to use instead of chunks; the trainer sets it. When called with x_TD, weight_VD
            and labels_T, it returns the sum of the cross-entropies in nats over the labels that are not -100, with
            gradients for x and weight.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.fused_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits or, given labels, the loss.

        Args:
            x: [..., D].
            labels: [...], the next tokens; -100 is ignored. None returns the logits.

        Returns:
            Logits [..., V], or the mean cross-entropy in nats in fp32. If all labels are -100, it is NaN and the
            gradients are zero, as in `F.cross_entropy`.

        Raises:
            RuntimeError: x and labels have different numbers of tokens.
        """
        if labels is None:
            return super().forward(x)
        x_TD, labels_T = x.flatten(0, -2), labels.flatten()
        if self.fused_cross_entropy is not None:
            total = self.fused_cross_entropy(x_TD, self.weight, labels_T)
        else:
            # Under no_grad, ctx.needs_input_grad is still true.
            total = _ChunkedCrossEntropy.apply(x_TD, self.weight, labels_T, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        count = (labels_T != _IGNORED).sum()
        mean: Tensor = (total / count.clamp_min(1)).masked_fill(count == 0, torch.nan)
        return mean


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum the cross-entropies over chunks of tokens and compute both gradients in the forward pass.

    The gradient of a chunk overwrites its logits, and both are freed before the next chunk. No GEMM runs twice. The
    result is the sum instead of the mean, because gradients that are divided by the number of tokens before loss
    scaling would underflow in fp16. The weight's gradient is accumulated in fp32, which takes 4 bytes per weight until
    the last
    chunk: in bf16 each chunk would round the sum again.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, learning: bool) -> Tensor:
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        # A row of zeros has finite logits and does not change the weight's gradient.
        ignored_T = labels_T == _IGNORED
        clean_TD = x_TD.masked_fill(ignored_T.unsqueeze(1), 0).to(dtype)
        labels_T1 = labels_T.masked_fill(ignored_T, 0).unsqueeze(1)
        cast_VD = weight_VD.to(dtype)
        wants_x, wants_weight = (learning and needed for needed in ctx.needs_input_grad[:2])
        exact = torch.promote_types(dtype, torch.float32)
        grad_TD = torch.empty_like(clean_TD) if wants_x else None
        grad_VD = torch.zeros_like(weight_VD, dtype=exact) if wants_weight else None

        losses = []
        rows = max(1, _CHUNK_BYTES // (4 * weight_VD.shape[0]))
        with torch.autocast(device, enabled=False):
            for start in range(0, x_TD.shape[0], rows):
                part = slice(start, start + rows)
                x_tD, labels_t1 = clean_TD[part], labels_T1[part]
                log_p_tV = torch.log_softmax(x_tD @ cast_VD.T, dim=-1, dtype=exact)
                losses.append(-log_p_tV.gather(1, labels_t1))
                if not (wants_x or wants_weight):
                    continue
                grad_tV = log_p_tV.exp_()
                grad_tV.scatter_add_(1, labels_t1, torch.full_like(losses[-1], -1))
                grad_tV = grad_tV.to(dtype)
                if grad_TD is not None:
                    torch.mm(grad_tV, cast_VD, out=grad_TD[part])
                if grad_VD is not None and dtype is exact:
                    grad_VD.addmm_(grad_tV.T, x_tD)
                elif grad_VD is not None:
                    grad_VD += grad_tV.T @ x_tD
        if grad_TD is not None:
            grad_TD = grad_TD.masked_fill_(ignored_T.unsqueeze(1), 0).to(x_TD.dtype)
        ctx.gradients = grad_TD, None if grad_VD is None else grad_VD.to(weight_VD.dtype)
        return torch.cat(losses).squeeze(1).masked_fill(ignored_T, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # In place: a second gradient of the vocabulary's size would raise the peak memory of the step.
        scaled = [None if gradient is None else gradient.mul_(grad) for gradient in ctx.gradients]
        ctx.gradients = None
        return *scaled, None, None
