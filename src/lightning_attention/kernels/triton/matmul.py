"""Products of some hundred rows with a matrix in the tensor cores, with what a block of a model does after them.

For fewer rows ``projection.py`` computes products without tensor cores. With more, one takes so long that the launches
around it do not count, and cuBLAS is as good. Here a product takes 4 to 10 µs, and each operation on its result 2.
"""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch, tiling

#: Bytes of shared memory for what is on its way: of one program on a multiprocessor, or of each of two.
ALONE, SHARED = 200 << 10, 100 << 10


class Tile(NamedTuple):
    """What a program computes, ``rows`` by ``columns``, over ``width`` numbers at a time, ``stages`` of them loaded."""

    rows: int
    columns: int
    width: int
    stages: int


@cache
def tile(N: int, O: int, twin: bool, multiprocessors: int) -> Tile:
    """For N rows and a matrix of O, or two.

    Measured on an H200 for the products of the 385M, N 16 to 512: 32 columns as long as programs have a multiprocessor
    each, then more, since all of them read the rows again. 128 numbers at a time are best where 4 such stages fit; 8
    stages were no faster.
    """
    rows, columns = 64, 32
    programs = lambda columns: -(-N // rows) * -(-O // columns)  # noqa: E731
    while programs(columns) > multiprocessors and columns < (64 if twin else 128):
        columns *= 2
    loaded = rows + columns * (2 if twin else 1)
    width = 128 if loaded <= 128 else 64
    memory = ALONE if programs(columns) <= multiprocessors else SHARED
    return Tile(rows, columns, width, min(4 if width == 128 else 5, memory // (2 * loaded * width)))


def prepare(x: Tensor, gate: Tensor | None, eps: float | None) -> Tensor:
    """SRMSNorm(x) ⊙ gate, x's rows one after another; x itself without either."""
    if gate is None and eps is None:
        return x
    N, K = x.shape
    out = x.new_empty(N, K)
    prepare_kernel[(N, 1, 1)](
        x, x.stride(0), gate, 0 if gate is None else gate.stride(0), out, 0.0 if eps is None else eps, K,
        triton.next_power_of_2(K), eps is not None, num_warps=4, **dispatch.FUSION,
    )  # fmt: skip
    return out


def matmul(x: Tensor, weight: Tensor, second: Tensor | None, residual: Tensor | None, silu: int) -> Tensor:
    """The product of ``Backend.project``, after norm and gate; all with rows one after another, of 16 bits."""
    (N, K), O = x.shape, len(weight)
    out = x.new_empty(N, O)
    chosen = tile(N, O, second is not None, tiling.device(x)[1])
    args = (
        x, x.stride(0), weight, weight.stride(0), second, 0 if second is None else second.stride(0), residual,
        0 if residual is None else residual.stride(0), out, N,
    )  # fmt: skip
    rows, columns, width, stages = chosen
    matmul_kernel[(triton.cdiv(N, rows) * triton.cdiv(O, columns), 1, 1)](
        *args, O, K, silu, rows, columns, width, num_warps=4, num_stages=stages, **dispatch.FUSION
    )
    return out


@triton.jit(do_not_specialize=["eps"])
def prepare_kernel(x, x_stride, gate, gate_stride, out, eps, K: tl.constexpr, WIDTH: tl.constexpr,
                   NORM: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    y = tl.load(x + row * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
    if NORM:
        y *= tl.rsqrt(tl.sum(y * y, 0) / K + eps)
    if gate is not None:
        y *= tl.load(gate + row * gate_stride + at, mask=at < K, other=0.0).to(tl.float32)
    tl.store(out + row * K + at, y.to(out.dtype.element_ty), mask=at < K)


@triton.jit(do_not_specialize=["N"])
def matmul_kernel(x, x_stride, weight, weight_stride, second, second_stride, residual, residual_stride, out, N,
                  O: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  WIDTH: tl.constexpr):  # fmt: skip
    """Programs that share a part of the matrix are started one after another: one of them brings it into the L2."""
    tiles = tl.cdiv(N, ROWS)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, WIDTH)
    # Where there are no more, some are read again and not written: a mask costs a sixth of the time. They are different
    # ones, for all programs' reading the same row took longer than reading 64.
    row_read, col_read = (row % N).to(tl.int64), (col % O).to(tl.int64)
    xs = x + row_read[:, None] * x_stride + at[None, :]
    weights = weight + col_read[None, :] * weight_stride + at[:, None]
    if second is not None:
        seconds = second + col_read[None, :] * second_stride + at[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    twins = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, WIDTH):
        IS_WHOLE: tl.constexpr = K % WIDTH == 0
        exists = first + at < K
        a = load_part(xs + first, exists[None, :], IS_WHOLE)
        sums = tl.dot(a, load_part(weights + first, exists[:, None], IS_WHOLE), sums)
        if second is not None:
            twins = tl.dot(a, load_part(seconds + first, exists[:, None], IS_WHOLE), twins)
    if second is not None:
        sums *= twins
    finish(sums, row, col, residual, residual_stride, out, N, O, SILU)


@triton.jit
def load_part(where, exists, IS_WHOLE: tl.constexpr):
    if IS_WHOLE:
        part = tl.load(where)
    else:
        part = tl.load(where, mask=exists, other=0.0)
    return part


@triton.jit
def finish(sums, row, col, residual, residual_stride, out, N, O: tl.constexpr, SILU: tl.constexpr):
    """Activation, sum and store of these rows and columns of a product."""
    if SILU > 0:
        sums = tl.where((col < SILU)[None, :], sums * tl.sigmoid(sums), sums)
    written = (row < N)[:, None] & (col < O)[None, :]
    if residual is not None:
        stream = residual + row[:, None] * residual_stride + col[None, :]
        sums += tl.load(stream, mask=written, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * O + col[None, :], sums.to(out.dtype.element_ty), mask=written)
