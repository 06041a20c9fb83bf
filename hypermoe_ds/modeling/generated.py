"""Applies generated HyperExperts to their tokens: rows sorted by set, one grouped matrix product down and one up.

Equation: step 6 of docs/METHOD.md.

Shape legend: T tokens, D hidden size, A adapter size, U sets, J HyperExperts that a token takes, R = T * J rows.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Sorting takes as long as applying so many rows one after another (60 and 18 us on a CPU, D = 768, A = 64).
_FEW_ROWS = 4
# PyTorch's grouped GEMM on CUDA takes fewer than 1,024 groups, and is a loop that waits for the host before Hopper.
_MOST_GROUPS = 1023
_HOPPER = (9, 0)


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
    """Which HyperExperts each token takes.

    Attributes:
        sets_TJ: rows of the HyperExperts.
        gates_TJ: what each is weighted with; None weights all with one.
    """

    sets_TJ: Tensor
    gates_TJ: Tensor | None = None

    def sum_over_rows(self, y_RD: Tensor) -> Tensor:
        """Weight the rows of each token and add them up; y_RD -> y_TD."""
        y_TJD = y_RD.view(*self.sets_TJ.shape, -1)
        if self.gates_TJ is not None:
            y_TJD = y_TJD * self.gates_TJ.unsqueeze(-1).to(y_RD.dtype)
        return y_TJD.sum(1)


def apply_generated(
    x_TD: Tensor, assignment: Assignment, weights: HyperExpertWeights, rows: "RoutedRows | None" = None
) -> Tensor:
    """Sum over each token's HyperExperts of gate * (relu(x W_down + b_down) W_up + b_up).

    Exact, with gradients for x, the gates and the weights, once differentiable. Beside its arguments
    it keeps [R, A] numbers for the backward pass: sorted tokens are gathered again there, which costs less
    than keeping them. In a graph of torch.compile or torch.export every token passes all U of them.

    Args:
        x_TD: input of the MoE block.
        taken: which HyperExperts each token takes.
        weights: the generated weights.
        rows: what `sort_rows` made of `taken`, if it did before.

    Returns:
        y_TD, in the dtype of the weights.
    """
    if torch.compiler.is_compiling():
        return _through_all(x_TD, assignment, weights)
    if not torch.is_grad_enabled() and not x_TD.is_cuda and assignment.sets_TJ.numel() <= _FEW_ROWS:
        return _row_by_row(x_TD, assignment, weights)
    rows = rows or sort_rows(assignment, weights.down_weight.shape, weights.down_weight)
    x_TD = x_TD.to(weights.up_bias.dtype)  # under autocast another one
    y_TD: Tensor = _Apply.apply(x_TD, assignment.gates_TJ, rows, assignment.sets_TJ.shape[1], *weights)  # type: ignore[no-untyped-call]
    return y_TD


def _through_all(x_TD: Tensor, assignment: Assignment, weights: HyperExpertWeights) -> Tensor:
    """Every token through all U HyperExperts, those that it does not take weighted with zero.

    No shape depends on data, and the operators are plain in every dtype. The U of K = 1 are N of width A: at
    D = 768, N = 8, A = 64 a sixth of an expert's FLOPs.
    """
    U, D, A = weights.down_weight.shape
    x_TD = x_TD.to(weights.up_bias.dtype)
    gates_TJ = (
        torch.ones_like(assignment.sets_TJ, dtype=x_TD.dtype) if assignment.gates_TJ is None else assignment.gates_TJ
    )
    gate_TU = x_TD.new_zeros(x_TD.shape[0], U).scatter(1, assignment.sets_TJ, gates_TJ.to(x_TD.dtype))
    down_DUA = weights.down_weight.transpose(0, 1).reshape(D, U * A)
    inner_TUA = torch.relu(x_TD @ down_DUA + weights.down_bias.flatten()).view(-1, U, A)
    gated_TUA = (inner_TUA * gate_TU.unsqueeze(-1)).flatten(1)
    return gated_TUA @ weights.up_weight.flatten(0, 1) + gate_TU @ weights.up_bias


def _row_by_row(x_TD: Tensor, assignment: Assignment, weights: HyperExpertWeights) -> Tensor:
    """For the few rows of a step of generation, without gradients."""
    rows = []
    for row, index in enumerate(assignment.sets_TJ.flatten().tolist()):
        down_DA, down_bias_A, up_AD, up_bias_D = (weight[index] for weight in weights)
        token = row // assignment.sets_TJ.shape[1]
        x_1D = x_TD[token : token + 1].to(up_AD.dtype)
        rows.append(torch.addmm(up_bias_D, torch.addmm(down_bias_A, x_1D, down_DA).relu_(), up_AD))
    return assignment.sum_over_rows(torch.cat(rows))


def sort_rows(assignment: Assignment, shape_UDA: Sequence[int], like: Tensor) -> "RoutedRows":
    """The rows of all tokens sorted by the HyperExpert they take.

    Args:
        taken: which HyperExperts each token takes.
        shape_UDA: U, D and A.
        like: a tensor of the dtype and on the device of the products.
    """
    kind = GroupedRows if _has_grouped_mm(shape_UDA[1:], like) else LoopedRows
    return kind(assignment.sets_TJ.flatten(), shape_UDA[0])


def _has_grouped_mm(widths: Sequence[int], like: Tensor) -> bool:
    """Whether the device has a grouped GEMM for this dtype and its rows are aligned to 16 bytes."""
    if not like.is_cuda or like.dtype is not torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    aligned = all(width * like.element_size() % 16 == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(like.device) >= _HOPPER


class RoutedRows:
    """Rows sorted by the set they take, and matrix products of each set's rows with its own weights.

    Args:
        sets_R: the set of each row.
        sets: number of sets U.
    """

    def __init__(self, sets_R: Tensor, sets: int) -> None:
        self.order_R = torch.argsort(sets_R, stable=True)
        self.sets_R = sets_R[self.order_R]
        every_U = torch.arange(sets, device=sets_R.device)
        self.ends_U = torch.searchsorted(self.sets_R, every_U, right=True, out_int32=True)

    def affine(
        self, x_RI: Tensor, weight_UIO: Tensor, bias_UO: Tensor | None = None, gate_R1: Tensor | None = None
    ) -> Tensor:
        """x W + gate * b of each row's set; y_RO."""
        raise NotImplementedError

    def outer(self, x_RI: Tensor, y_RO: Tensor) -> Tensor:
        """Sum over each set's rows of x^T y; [U, I, O]."""
        raise NotImplementedError

    def sum(self, y_RO: Tensor) -> Tensor:
        """Sum over each set's rows; [U, O]."""
        raise NotImplementedError


class _Chunk(NamedTuple):
    """As many sets as one grouped GEMM takes."""

    sets: slice
    rows: slice
    ends_U: Tensor


class GroupedRows(RoutedRows):
    """By grouped GEMMs: nothing waits for the host, unless the sets are more than one of them takes."""

    def __init__(self, sets_R: Tensor, sets: int) -> None:
        super().__init__(sets_R, sets)
        cuts = list(range(_MOST_GROUPS, sets, _MOST_GROUPS))
        row_cuts = self.ends_U[[cut - 1 for cut in cuts]].tolist() if cuts else []
        chunks = zip(pairwise([0, *cuts, sets]), pairwise([0, *row_cuts, len(sets_R)]), strict=True)
        self._chunks = [
            _Chunk(slice(*between), slice(*rows), self.ends_U[slice(*between)] - rows[0]) for between, rows in chunks
        ]

    def affine(
        self, x_RI: Tensor, weight_UIO: Tensor, bias_UO: Tensor | None = None, gate_R1: Tensor | None = None
    ) -> Tensor:
        y_RO = _joined(
            [
                torch._grouped_mm(x_RI[chunk.rows], weight_UIO[chunk.sets], offs=chunk.ends_U)
                for chunk in self._chunks
                if chunk.rows.start < chunk.rows.stop
            ]
        )
        if bias_UO is None:
            return y_RO
        bias_RO = bias_UO[self.sets_R]
        return y_RO.add_(bias_RO if gate_R1 is None else bias_RO.mul_(gate_R1))

    def outer(self, x_RI: Tensor, y_RO: Tensor) -> Tensor:
        return _joined(
            [
                torch._grouped_mm(x_RI[chunk.rows].t(), y_RO[chunk.rows], offs=chunk.ends_U)
                if chunk.rows.start < chunk.rows.stop
                else x_RI.new_zeros(len(chunk.ends_U), x_RI.shape[1], y_RO.shape[1])
                for chunk in self._chunks
            ]
        )

    def sum(self, y_RO: Tensor) -> Tensor:
        # A product with ones, as many as 16 bytes hold: without atomics, so the same bits every time.
        return self.outer(y_RO.new_ones(len(y_RO), 16 // y_RO.element_size()), y_RO)[:, 0]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class LoopedRows(RoutedRows):
    """By one matrix product a set, each written in place; the host learns how many rows a set has.

    In bf16 on CPU oneDNN makes code for each number of rows that it meets, which takes longer than the product. There a
    set reaches over some rows of the sets behind it, whose own products are written over theirs.
    """

    def __init__(self, sets_R: Tensor, sets: int) -> None:
        super().__init__(sets_R, sets)
        ends = self.ends_U.tolist()
        self._rows_of_set = [slice(*between) for between in zip([0, *ends], ends, strict=False)]

    def _reach(self, rows: slice, like: Tensor) -> slice:
        if like.is_cuda or like.dtype is torch.float32:
            return rows
        count = rows.stop - rows.start
        multiple = max(32, 1 << count.bit_length() >> 3)  # at most a quarter more, but for sets of few rows
        return slice(rows.start, min(rows.start + math.ceil(count / multiple) * multiple, like.shape[0]))

    def affine(
        self, x_RI: Tensor, weight_UIO: Tensor, bias_UO: Tensor | None = None, gate_R1: Tensor | None = None
    ) -> Tensor:
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_UIO.shape[2])
        for index, rows in enumerate(self._rows_of_set):
            if rows.start == rows.stop:
                continue
            reach = self._reach(rows, x_RI)
            if bias_UO is None:
                torch.mm(x_RI[reach], weight_UIO[index], out=y_RO[reach])
            else:
                bias_tO = bias_UO[index] if gate_R1 is None else gate_R1[reach] * bias_UO[index]
                torch.addmm(bias_tO, x_RI[reach], weight_UIO[index], out=y_RO[reach])
        return y_RO

    def outer(self, x_RI: Tensor, y_RO: Tensor) -> Tensor:
        product_UIO = x_RI.new_empty(len(self._rows_of_set), x_RI.shape[1], y_RO.shape[1])
        for index, rows in enumerate(self._rows_of_set):
            reach = self._reach(rows, x_RI)
            x_tI, y_tO = x_RI[reach], y_RO[reach]
            beyond = (0, 0, 0, reach.stop - rows.stop)
            if reach != rows and x_RI.shape[1] <= y_RO.shape[1]:
                x_tI = F.pad(x_RI[rows], beyond)
            elif reach != rows:
                y_tO = F.pad(y_RO[rows], beyond)
            torch.mm(x_tI.t(), y_tO, out=product_UIO[index])
        return product_UIO

    def sum(self, y_RO: Tensor) -> Tensor:
        sum_UO = y_RO.new_empty(len(self._rows_of_set), y_RO.shape[1])
        for index, rows in enumerate(self._rows_of_set):
            torch.sum(y_RO[rows], 0, out=sum_UO[index])
        return sum_UO


class _Apply(torch.autograd.Function):
    """`apply_generated` for rows that are sorted already."""

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
            # d y / d gate is the row's own output: inner W_up + b_up.
            grad_gate_R = (grad_inner_RA * inner_RA).sum(1) + (grad_RD * up_bias_UD[rows.sets_R]).sum(1)
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
    """Sorted rows back in the order of the tokens, those of one token added up; y_TD."""
    back_RD = torch.empty_like(y_RD).index_copy_(0, rows.order_R, y_RD)
    return back_RD if per_token == 1 else back_RD.view(-1, per_token, y_RD.shape[1]).sum(1)
