"""Products of a few rows with a matrix, with what a block of a model does before and after them.

A step of generation reads every weight once for a handful of rows: the products take the time that their weights take
to read, and what stands between them takes the time of a launch each. Here a norm, a gate, an activation and the sum
with the residual stream are part of the product.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch

MOST_ROWS = 512  # past them a product is bound by its operations, and cuBLAS is the faster
DTYPES = (torch.bfloat16, torch.float32)  # in float16 the product of a gate and what is not normalised may overflow


class Tile(NamedTuple):
    """What a program computes, ``rows`` of x by ``columns`` of the output, over so much of the ``width`` at a time."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


@cache
def tile(N: int, O: int, K: int, twin: bool) -> Tile:
    """For a product of N rows and O columns; ``twin``: of two matrices."""
    if N == 1:
        # All of a row at once where registers hold it, and so few columns that all multiprocessors read.
        width = min(triton.next_power_of_2(K), 4096)
        columns = max(1, min(8, 8192 // width))
        return Tile(1, max(1, columns // 2) if twin or O < 2048 else columns, width, 4, 1)
    rows = 16 if N <= 16 else 32 if N <= 32 else 64
    tiles = triton.cdiv(N, rows)
    columns = 128
    while columns > 16 and tiles * triton.cdiv(O, columns) < 120:
        columns //= 2
    return Tile(rows, min(columns, 64) if twin else columns, 128 if rows < 64 else 64, 4, 3)


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
    out = x.new_empty(N, O)
    if N == 0:
        return out
    x, weight = dispatch.with_unit_rows(x), dispatch.with_unit_rows(weight)
    second, gate = (None if other is None else dispatch.with_unit_rows(other) for other in (second, gate))
    residual = None if residual is None else dispatch.with_unit_rows(residual)
    chosen = tile(N, O, K, second is not None)
    args = (
        x, x.stride(0), weight, weight.stride(0), second, 0 if second is None else second.stride(0), gate,
        0 if gate is None else gate.stride(0), residual, 0 if residual is None else residual.stride(0), out, N,
        0.0 if eps is None else eps,
    )  # fmt: skip
    grid = (triton.cdiv(O, chosen.columns), triton.cdiv(N, chosen.rows), 1)
    project_kernel[grid](
        *args, O, K, silu, eps is not None, chosen.rows, chosen.columns, chosen.width, num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N", "eps"])
def project_kernel(x, x_stride, weight, weight_stride, second, second_stride, gate, gate_stride, residual,
                   residual_stride, out, N, eps, O: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
                   NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The norm has no weight, so it is a factor for each row: the product is taken of what is not normalised yet."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Past the ends the last is read again, and not written.
    row_read = tl.minimum(row, N - 1).to(tl.int64)
    col_read = tl.minimum(col, O - 1).to(tl.int64)
    squares = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    twins = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, WIDTH):
        at = first + tl.arange(0, WIDTH)
        inside = at < K
        a = tl.load(x + row_read[:, None] * x_stride + at[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(weight + col_read[:, None] * weight_stride + at[None, :], mask=inside[None, :], other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
        if gate is not None:
            g = tl.load(gate + row_read[:, None] * gate_stride + at[None, :], mask=inside[None, :], other=0.0)
            a = a.to(tl.float32) * g.to(tl.float32)
        sums = _add_product(sums, a, b)
        if second is not None:
            c = tl.load(second + col_read[:, None] * second_stride + at[None, :], mask=inside[None, :], other=0.0)
            twins = _add_product(twins, a, c)
    if NORM:
        factor = tl.rsqrt(squares / K + eps)[:, None]
        sums = sums * factor
        twins = twins * factor
    if second is not None:
        sums = sums * twins
    if SILU > 0:
        sums = tl.where((col < SILU)[None, :], sums * tl.sigmoid(sums), sums)
    written = (row < N)[:, None] & (col < O)[None, :]
    if residual is not None:
        stream = residual + row_read[:, None] * residual_stride + col[None, :]
        sums += tl.load(stream, mask=written, other=0.0).to(tl.float32)
    tl.store(out + row_read[:, None] * O + col[None, :], sums.to(out.dtype.element_ty), mask=written)


@triton.jit
def _add_product(sums, a, b):
    """sums + a bᵀ, of a single row without the tensor cores, which take no less than 16."""
    if a.shape[0] == 1:
        sums += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)[None, :]
    else:
        sums = tl.dot(a.to(b.dtype), tl.trans(b), sums, input_precision="ieee")
    return sums
