"""Apply generated HyperExperts to tokens, with grouped matrix products over rows sorted by HyperExpert.

The equation is step 6 of docs/METHOD.md.

Shape legend: T tokens, D hidden size, A adapter size, U HyperExperts, J HyperExperts per token, R = T * J routed rows.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .configuration_hypermoe import HyperConditioning
from .selections import selection_ids

# Up to this number of rows, applying HyperExperts row by row is faster than sorting the rows (18 us compared with 60 us
# on a CPU, with D = 768 and A = 64).
_MAX_UNSORTED_ROWS = 4
# PyTorch's CUDA grouped GEMM accepts fewer than 1,024 groups. On GPUs older than Hopper, PyTorch instead loops over the
# groups, which synchronises the host with the GPU.
_MOST_GROUPS = 1023
_HOPPER, _BLACKWELL = 9, 10  # major compute capabilities of GPUs with a grouped GEMM


class HyperExpertWeights(NamedTuple):
    """The generated weights of U HyperExperts.

    Attributes:
        down_weight: [U, D, A].
        down_bias: [U, A].
        up_weight: [U, A, D].
        up_bias: [U, D].
    """

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


class Assignment(NamedTuple):
    """Assignment of HyperExperts to tokens.

    Attributes:
        ids_TJ: indices of each token's HyperExperts.
        gates_TJ: weights of these HyperExperts; None means that every weight is 1.
    """

    ids_TJ: Tensor
    gates_TJ: Tensor | None = None

    def sum_over_rows(self, y_RD: Tensor) -> Tensor:
        """Return y_TD, the weighted sum of each token's rows in y_RD."""
        y_TJD = y_RD.view(*self.ids_TJ.shape, -1)
        if self.gates_TJ is not None:
            y_TJD = y_TJD * self.gates_TJ.unsqueeze(-1).to(y_RD.dtype)
        return y_TJD.sum(1)


def assign(
    selected_TK: Tensor, gates_TK: Tensor | None, num_experts: int, conditioning: HyperConditioning
) -> Assignment:
    """Return each token's HyperExperts, as indices into the HyperExperts of all possible selections.

    Raises:
        ValueError: conditioning is "route" and there are no gates.
    """
    if conditioning == "selection":
        return Assignment(selection_ids(selected_TK, num_experts).unsqueeze(1))
    if gates_TK is None:
        raise ValueError("conditioning 'route' needs gates: pass gates_TK")
    return Assignment(selected_TK, gates_TK)


def apply_generated(
    x_TD: Tensor, assignment: Assignment, weights: HyperExpertWeights, rows: "RoutedRows | None" = None
) -> Tensor:
    """Return the sum over each token's HyperExperts of gate * (relu(x W_down + b_down) W_up + b_up).

    The result is exact and can be differentiated once, with respect to x, the gates and the weights. For the backward
    pass, the function saves its arguments and a tensor of shape [R, A]. The backward pass gathers the sorted tokens
    again, which is cheaper than saving them. Under torch.compile and torch.export, all U HyperExperts are applied to
    every token.

    Args:
        x_TD: input of the MoE block.
        assignment: HyperExperts of each token.
        weights: the generated weights.
        rows: result of `sort_rows` for this assignment; if None, this function sorts the rows.

    Returns:
        y_TD, in the dtype of the weights.
    """
    if torch.compiler.is_compiling():
        return _through_all(x_TD, assignment, weights)
    if not torch.is_grad_enabled() and not x_TD.is_cuda and assignment.ids_TJ.numel() <= _MAX_UNSORTED_ROWS:
        return _row_by_row(x_TD, assignment, weights)
    rows = rows or sort_rows(assignment, weights.down_weight.shape, weights.down_weight)
    x_TD = x_TD.to(weights.up_bias.dtype)  # the dtypes differ under autocast
    y_TD: Tensor = _Apply.apply(x_TD, assignment.gates_TJ, rows, assignment.ids_TJ.shape[1], *weights)  # type: ignore[no-untyped-call]
    return y_TD


def _through_all(x_TD: Tensor, assignment: Assignment, weights: HyperExpertWeights) -> Tensor:
    """Apply all U HyperExperts to every token, with gate 0 for HyperExperts that the token does not use.

    No tensor shape depends on the data, and the operators support every dtype. For K = 1, there are U = N HyperExperts.
    With D = 768, N = 8 and A = 64, applying all of them takes a sixth of an expert's FLOPs.
    """
    U, D, A = weights.down_weight.shape
    x_TD = x_TD.to(weights.up_bias.dtype)
    gates_TJ = (
        torch.ones_like(assignment.ids_TJ, dtype=x_TD.dtype) if assignment.gates_TJ is None else assignment.gates_TJ
    )
    gate_TU = x_TD.new_zeros(x_TD.shape[0], U).scatter(1, assignment.ids_TJ, gates_TJ.to(x_TD.dtype))
    down_DUA = weights.down_weight.transpose(0, 1).reshape(D, U * A)
    inner_TUA = torch.relu(x_TD @ down_DUA + weights.down_bias.flatten()).view(-1, U, A)
    gated_TUA = (inner_TUA * gate_TU.unsqueeze(-1)).flatten(1)
    return gated_TUA @ weights.up_weight.flatten(0, 1) + gate_TU @ weights.up_bias


def _row_by_row(x_TD: Tensor, assignment: Assignment, weights: HyperExpertWeights) -> Tensor:
    """Apply HyperExperts row by row, without gradients. This is fast for the few rows of a decoding step."""
    rows = []
    for row, index in enumerate(assignment.ids_TJ.flatten().tolist()):
        down_DA, down_bias_A, up_AD, up_bias_D = (weight[index] for weight in weights)
        token = row // assignment.ids_TJ.shape[1]
        x_1D = x_TD[token : token + 1].to(up_AD.dtype)
        rows.append(torch.addmm(up_bias_D, torch.addmm(down_bias_A, x_1D, down_DA).relu_(), up_AD))
    return assignment.sum_over_rows(torch.cat(rows))


def sort_rows(assignment: Assignment, shape_UDA: Sequence[int], like: Tensor) -> "RoutedRows":
    """Sort the routed rows of all tokens by HyperExpert.

    Args:
        assignment: HyperExperts of each token.
        shape_UDA: U, D and A.
        like: a tensor with the dtype and device of the matrix products.
    """
    kind = GroupedRows if _has_grouped_mm(shape_UDA[1:], like) else LoopedRows
    return kind(assignment.ids_TJ.flatten(), shape_UDA[0])


def _has_grouped_mm(widths: Sequence[int], like: Tensor) -> bool:
    """Return whether a grouped GEMM is available for this device, dtype and shape.

    The grouped GEMM needs rows that are aligned to 16 bytes.
    """
    if not like.is_cuda or like.dtype is not torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    aligned = all(width * like.element_size() % 16 == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(like.device)[0] in (_HOPPER, _BLACKWELL)


def _fills_empty_groups(like: Tensor) -> bool:
    """Return whether a grouped product over the rows leaves arbitrary values in groups without rows.

    B200 GPUs leave such values (https://github.com/pytorch/pytorch/issues/172439).
    """
    return like.is_cuda and torch.cuda.get_device_capability(like.device)[0] == _BLACKWELL


class RoutedRows:
    """Routed rows sorted by HyperExpert, with methods that multiply each row by its HyperExpert's weights.

    Args:
        ids_R: HyperExpert of each row.
        count: number of HyperExperts U.
    """

    def __init__(self, ids_R: Tensor, count: int) -> None:
        # GPUs sort shorter keys with fewer kernels: 8 kernels for 8-bit keys, compared with 22 for 64-bit keys.
        self.order_R = torch.argsort(ids_R.to(torch.uint8 if count <= 256 else torch.int32), stable=True)
        self.ids_R = ids_R[self.order_R]
        all_U = torch.arange(count, device=ids_R.device)
        self.ends_U = torch.searchsorted(self.ids_R, all_U, right=True, out_int32=True)

    def affine(
        self, x_RI: Tensor, weight_UIO: Tensor, bias_UO: Tensor | None = None, gate_R1: Tensor | None = None
    ) -> Tensor:
        """Return y_RO = x W + gate * b, where W and b are the weight and bias of the row's HyperExpert."""
        raise NotImplementedError

    def outer(self, x_RI: Tensor, y_RO: Tensor) -> Tensor:
        """Return the sum of x^T y over the rows of each HyperExpert, [U, I, O]."""
        raise NotImplementedError

    def sum(self, y_RO: Tensor) -> Tensor:
        """Return the sum over the rows of each HyperExpert, [U, O]."""
        raise NotImplementedError


class _Chunk(NamedTuple):
    """A range of HyperExperts that one grouped GEMM applies, and the rows of these HyperExperts."""

    ids: slice
    rows: slice
    ends_U: Tensor


class GroupedRows(RoutedRows):
    """Multiply rows with grouped GEMMs. The host waits for the device only if there are several grouped GEMMs."""

    def __init__(self, ids_R: Tensor, count: int) -> None:
        super().__init__(ids_R, count)
        cuts = list(range(_MOST_GROUPS, count, _MOST_GROUPS))
        row_cuts = self.ends_U[[cut - 1 for cut in cuts]].tolist() if cuts else []
        chunks = zip(pairwise([0, *cuts, count]), pairwise([0, *row_cuts, len(ids_R)]), strict=True)
        self._chunks = [
            _Chunk(slice(*bounds), slice(*rows), self.ends_U[slice(*bounds)] - rows[0]) for bounds, rows in chunks
        ]

    def affine(
        self, x_RI: Tensor, weight_UIO: Tensor, bias_UO: Tensor | None = None, gate_R1: Tensor | None = None
    ) -> Tensor:
        y_RO = _joined(
            [
                torch._grouped_mm(x_RI[chunk.rows], weight_UIO[chunk.ids], offs=chunk.ends_U)
                for chunk in self._chunks
                if chunk.rows.start < chunk.rows.stop
            ]
        )
        if bias_UO is None:
            return y_RO
        bias_RO = bias_UO[self.ids_R]
        return y_RO.add_(bias_RO if gate_R1 is None else bias_RO.mul_(gate_R1))

    def outer(self, x_RI: Tensor, y_RO: Tensor) -> Tensor:
        product_UIO = _joined(
            [
                torch._grouped_mm(x_RI[chunk.rows].t(), y_RO[chunk.rows], offs=chunk.ends_U)
                if chunk.rows.start < chunk.rows.stop
                else x_RI.new_zeros(len(chunk.ends_U), x_RI.shape[1], y_RO.shape[1])
                for chunk in self._chunks
            ]
        )
        if _fills_empty_groups(x_RI):
            empty_U = self.ends_U.diff(prepend=self.ends_U.new_zeros(1)) == 0
            product_UIO.masked_fill_(empty_U.view(-1, 1, 1), 0)
        return product_UIO

    def sum(self, y_RO: Tensor) -> Tensor:
        # Multiplying by a 16-byte-wide matrix of ones uses no atomics, so the sum is deterministic.
        return self.outer(y_RO.new_ones(len(y_RO), 16 // y_RO.element_size()), y_RO)[:, 0]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class LoopedRows(RoutedRows):
    """Run one matrix product per HyperExpert. The host waits until the device has counted the rows.

    For bf16 on CPU, oneDNN compiles a kernel for each new number of rows. Compiling takes longer than the product
    itself. Each bf16 product on CPU therefore includes extra rows, so that its number of rows is rounded up. The extra
    rows belong to the next HyperExperts, whose own products overwrite the results.
    """

    def __init__(self, ids_R: Tensor, count: int) -> None:
        super().__init__(ids_R, count)
        ends = self.ends_U.tolist()
        self._rows_of = [slice(*bounds) for bounds in zip([0, *ends], ends, strict=False)]

    def _extend(self, rows: slice, like: Tensor) -> slice:
        if like.is_cuda or like.dtype is torch.float32:
            return rows
        count = rows.stop - rows.start
        multiple = max(32, 1 << count.bit_length() >> 3)  # at most a quarter more rows, unless there are few
        return slice(rows.start, min(rows.start + math.ceil(count / multiple) * multiple, like.shape[0]))

    def affine(
        self, x_RI: Tensor, weight_UIO: Tensor, bias_UO: Tensor | None = None, gate_R1: Tensor | None = None
    ) -> Tensor:
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_UIO.shape[2])
        for index, rows in enumerate(self._rows_of):
            if rows.start == rows.stop:
                continue
            extended = self._extend(rows, x_RI)
            if bias_UO is None:
                torch.mm(x_RI[extended], weight_UIO[index], out=y_RO[extended])
            else:
                bias_tO = bias_UO[index] if gate_R1 is None else gate_R1[extended] * bias_UO[index]
                torch.addmm(bias_tO, x_RI[extended], weight_UIO[index], out=y_RO[extended])
        return y_RO

    def outer(self, x_RI: Tensor, y_RO: Tensor) -> Tensor:
        product_UIO = x_RI.new_empty(len(self._rows_of), x_RI.shape[1], y_RO.shape[1])
        for index, rows in enumerate(self._rows_of):
            extended = self._extend(rows, x_RI)
            x_tI, y_tO = x_RI[extended], y_RO[extended]
            padding = (0, 0, 0, extended.stop - rows.stop)
            if extended != rows and x_RI.shape[1] <= y_RO.shape[1]:
                x_tI = F.pad(x_RI[rows], padding)
            elif extended != rows:
                y_tO = F.pad(y_RO[rows], padding)
            torch.mm(x_tI.t(), y_tO, out=product_UIO[index])
        return product_UIO

    def sum(self, y_RO: Tensor) -> Tensor:
        sum_UO = y_RO.new_empty(len(self._rows_of), y_RO.shape[1])
        for index, rows in enumerate(self._rows_of):
            torch.sum(y_RO[rows], 0, out=sum_UO[index])
        return sum_UO


class _Apply(torch.autograd.Function):
    """Autograd function of `apply_generated` for sorted rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TJ: Tensor | None,
        rows: RoutedRows,
        per_token: int,
        *weights: Tensor,
    ) -> Tensor:
        down_UDA, down_bias_UA, up_UAD, up_bias_UD = weights
        gate_R1 = _sorted_gates(gates_TJ, rows, x_TD)
        inner_RA = rows.affine(x_TD[rows.order_R // per_token], down_UDA, down_bias_UA).relu_()
        gated_RA = inner_RA if gate_R1 is None else inner_RA * gate_R1
        y_RD = rows.affine(gated_RA, up_UAD, up_bias_UD, gate_R1)
        ctx.rows, ctx.per_token = rows, per_token
        ctx.save_for_backward(x_TD, gates_TJ, inner_RA, down_UDA, up_UAD, up_bias_UD)
        return _by_token(y_RD, rows, per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows, per_token = ctx.rows, ctx.per_token
        x_TD, gates_TJ, inner_RA, down_UDA, up_UAD, up_bias_UD = ctx.saved_tensors
        gate_R1 = _sorted_gates(gates_TJ, rows, x_TD)
        token_R = rows.order_R // per_token
        grad_RD = grad_TD[token_R]
        grad_inner_RA = rows.affine(grad_RD, up_UAD.transpose(1, 2))
        grad_gates_TJ, gated_RA = None, inner_RA
        if gate_R1 is not None:
            # The derivative of y with respect to the gate is the row's output, inner W_up + b_up.
            grad_gate_R = (grad_inner_RA * inner_RA).sum(1) + (grad_RD * up_bias_UD[rows.ids_R]).sum(1)
            grad_gates_TJ = torch.empty_like(gates_TJ).view(-1).index_copy_(
                0, rows.order_R, grad_gate_R.to(gates_TJ.dtype)
            ).view_as(gates_TJ)  # fmt: skip
            gated_RA = inner_RA * gate_R1
            grad_inner_RA *= gate_R1
        grad_up_UAD = rows.outer(gated_RA, grad_RD)
        grad_up_bias_UD = rows.sum(grad_RD if gate_R1 is None else grad_RD * gate_R1)
        grad_inner_RA = torch.ops.aten.threshold_backward(grad_inner_RA, inner_RA, 0)
        grad_down_UDA = rows.outer(x_TD[token_R], grad_inner_RA)
        grad_x_TD = _by_token(rows.affine(grad_inner_RA, down_UDA.transpose(1, 2)), rows, per_token)
        grad_down_bias_UA = rows.sum(grad_inner_RA)
        weights = (grad_down_UDA, grad_down_bias_UA, grad_up_UAD, grad_up_bias_UD)
        return grad_x_TD, grad_gates_TJ, None, None, *weights


def _sorted_gates(gates_TJ: Tensor | None, rows: RoutedRows, like: Tensor) -> Tensor | None:
    return None if gates_TJ is None else gates_TJ.flatten()[rows.order_R].unsqueeze(1).to(like.dtype)


def _by_token(y_RD: Tensor, rows: RoutedRows, per_token: int) -> Tensor:
    """Restore the token order and return the sum of each token's rows, y_TD."""
    back_RD = torch.empty_like(y_RD).index_copy_(0, rows.order_R, y_RD)
    return back_RD if per_token == 1 else back_RD.view(-1, per_token, y_RD.shape[1]).sum(1)
