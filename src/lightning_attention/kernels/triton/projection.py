"""Products of a few rows with a matrix, with what a block of a model does before and after them.

A step of generation reads every weight once for a handful of rows: the products take the time that their weights take
to read, and what stands between them takes the time of a launch each. Here a norm, a gate, an activation and the sum
with the residual stream are part of the product.
"""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch, tiling
from lightning_attention.kernels.triton.matmul import finish, matmul, prepare

#: Rows that are multiplied without tensor cores. A step of the 385M on an H200 took 0.60 ms so for one row, and 1.22 by
#: PyTorch; with tensor cores 4 rows took 1.31 and 1.29.
FEW = 8


#: Multiplications of a product with tensor cores that is faster than cuBLAS's and what PyTorch does around it.
MOST = 4.5e9


def is_faster(
    x: Tensor, weight: Tensor, second: Tensor | None, gate: Tensor | None, eps: float | None, silu: int
) -> bool:
    """Whether these kernels are faster than PyTorch: more than a few rows were measured on Hopper alone."""
    if len(x) <= FEW:
        return True
    if tiling.device(x)[0] != (9, 0):
        return False
    # A sum is all that is left: cuBLAS splits long rows among programs, and is as fast with a kernel more.
    if second is None and gate is None and eps is None and not silu:
        return False
    return len(x) * weight.numel() * (1 if second is None else 2) <= MOST


class Tile(NamedTuple):
    """What a program computes: all ``rows``, padded, by ``columns`` of the output, over ``width`` numbers at a time."""

    rows: int
    columns: int
    width: int


@cache
def tile(N: int, O: int, K: int, twin: bool) -> Tile:
    """For a product of N rows and O columns, over K; ``twin``: of two matrices."""
    # All of a weight's row at once where registers hold it, and so few columns that all multiprocessors read.
    width = min(triton.next_power_of_2(K), 4096)
    columns = max(1, min(8, 8192 // width))
    return Tile(triton.next_power_of_2(N), max(1, columns // 2) if twin or O < 2048 else columns, width)


@dispatch.on_its_device
def project(
    x: Tensor,
    weight: Tensor,
    second: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float | None,
    silu: int,
) -> Tensor:
    """The arguments are those of ``Backend.project``."""
    (N, K), O = x.shape, len(weight)
    if N == 0:
        return x.new_empty(N, O)
    x, weight = dispatch.with_unit_rows(x), dispatch.with_unit_rows(weight)
    second, gate = (None if other is None else dispatch.with_unit_rows(other) for other in (second, gate))
    residual = None if residual is None else dispatch.with_unit_rows(residual)
    if N > FEW:
        return matmul(prepare(x, gate, eps), weight, second, residual, silu)
    out = x.new_empty(N, O)
    chosen = tile(N, O, K, second is not None)
    args = (
        x, x.stride(0), weight, weight.stride(0), second, 0 if second is None else second.stride(0), gate,
        0 if gate is None else gate.stride(0), residual, 0 if residual is None else residual.stride(0), out, N,
        0.0 if eps is None else eps,
    )  # fmt: skip
    project_kernel[(triton.cdiv(O, chosen.columns), 1, 1)](
        *args, O, K, silu, eps is not None, *chosen, num_warps=4, **dispatch.FUSION
    )
    return out


@triton.jit(do_not_specialize=["N", "eps"])
def project_kernel(x, x_stride, weight, weight_stride, second, second_stride, gate, gate_stride, residual,
                   residual_stride, out, N, eps, O: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
                   NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The norm has no weight, so it is a factor for each row: the product is taken of what is not normalised yet.

    A weight is read once and multiplied with row after row, without the tensor cores: they take no less than 16 rows.
    """
    row = tl.arange(0, ROWS)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    col_read = tl.minimum(col, O - 1).to(tl.int64)  # past the end the last is read again, and not written
    squares = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    twins = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, WIDTH):
        at = first + tl.arange(0, WIDTH)
        inside = at < K
        there = col_read[:, None] * weight_stride + at[None, :]
        b = tl.load(weight + there, mask=inside[None, :], other=0.0).to(tl.float32)
        if second is not None:
            there = col_read[:, None] * second_stride + at[None, :]
            c = tl.load(second + there, mask=inside[None, :], other=0.0).to(tl.float32)
        for n in tl.static_range(ROWS):
            own = inside & (at * 0 + n < N)
            a = tl.load(x + n * x_stride + at, mask=own, other=0.0).to(tl.float32)
            if NORM:
                squares += tl.where(row == n, tl.sum(a * a, 0), 0.0)
            if gate is not None:
                a *= tl.load(gate + n * gate_stride + at, mask=own, other=0.0).to(tl.float32)
            sums += tl.where((row == n)[:, None], tl.sum(a[None, :] * b, 1)[None, :], 0.0)
            if second is not None:
                twins += tl.where((row == n)[:, None], tl.sum(a[None, :] * c, 1)[None, :], 0.0)
    if NORM:
        factor = tl.rsqrt(squares / K + eps)[:, None]
        sums = sums * factor
        twins = twins * factor
    if second is not None:
        sums = sums * twins
    finish(sums, row, col, residual, residual_stride, out, N, O, SILU)
