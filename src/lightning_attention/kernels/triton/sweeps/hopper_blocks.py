"""Blocks in Hopper's shared memory: brought, cleared, masked, weighed and written, for both of its sweeps."""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.roles import state_pointers
from lightning_attention.kernels.triton.tiling import TensorView, Tiles
from lightning_attention.kernels.triton.work import is_past, is_within, nearest_border

# Their names until Triton 3.6, where the new ones do not exist.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


class Output(NamedTuple):
    """A contiguous tensor [B, T, H, width] that is written.

    By the copy engine, but for the last block of a packed sequence, which a copy of C rows would overrun.
    """

    descriptor: gl.tensor
    pointer: gl.tensor
    batch_stride: gl.tensor
    row_stride: gl.tensor


@gluon.jit
def order_of_blocks(rows, C: gl.constexpr, REVERSE: gl.constexpr):
    """How many blocks a sweep has, where the first one begins, and how far it is to the next."""
    blocks = (rows.stop - rows.start + C - 1) // C
    first = rows.start
    step = C
    if REVERSE:
        first = rows.start + (blocks - 1) * C
        step = -C
    return blocks, first, step


@gluon.jit
def borders_of(rows, start, line, C: gl.constexpr, REVERSE: gl.constexpr):
    """The borders of a block's rows, one for each number of ``line``, and its ``nearest_border``."""
    borders = gl.load(rows.borders + gl.minimum(start + line, rows.stop - 1))
    return borders, nearest_border(rows.borders, start, gl.minimum(start + C, rows.stop), REVERSE)


@gluon.jit
def clear_tail(smem, tokens, C: gl.constexpr, BW: gl.constexpr):
    """Zero the rows of a block past its ``tokens``: they are another sequence's, or padding that may hold anything."""
    # One vector a thread at a time: the loop has no registers to spare.
    V: gl.constexpr = min(8, C * BW // (32 * gl.num_warps()))
    R: gl.constexpr = 32 * V // BW * gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, V], [32 * V // BW, BW // V], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, R, gl.SliceLayout(1, layout))
    for r in gl.static_range(0, C, R):
        if r + R > tokens:
            rows = smem.slice(r, R)
            rows.store(gl.where((row + r < tokens)[:, None], rows.load(layout), 0.0).to(smem.dtype))


@gluon.jit
def keep_documents(p, border, at, C: gl.constexpr, REVERSE: gl.constexpr):
    """Zero the scores between documents, in shared memory: the loop has no registers to spare for it."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    R: gl.constexpr = 256 // C * gl.num_warps()
    row = at + gl.arange(0, R, gl.SliceLayout(1, layout))
    of_column = border.load(gl.SliceLayout(0, layout))
    for r in gl.static_range(0, C, R):
        rows = p.slice(r, R)
        within = is_within((row + r)[:, None], of_column[None, :], REVERSE)
        rows.store(gl.where(within, rows.load(layout), 0.0).to(p.dtype))


@gluon.jit
def keep_passing(x, border, start, stop, C: gl.constexpr, BW: gl.constexpr, REVERSE: gl.constexpr):
    """Zero the rows of a block whose documents do not go past it, in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BW, BW // 8], [gl.num_warps(), 1], [1, 0])
    R: gl.constexpr = 256 // BW * gl.num_warps()
    for r in gl.static_range(0, C, R):
        rows = x.slice(r, R)
        goes_past = is_past(border.slice(r, R).load(gl.SliceLayout(1, layout)), start, stop, REVERSE)
        rows.store(gl.where(goes_past[:, None], rows.load(layout), 0.0).to(x.dtype))


@gluon.jit
def store_tail(x, smem, stride, tokens, width, C: gl.constexpr, BW: gl.constexpr):
    """Write the first ``tokens`` rows of a block."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BW, BW // 8], [gl.num_warps(), 1], [1, 0])
    R: gl.constexpr = 256 // BW * gl.num_warps()
    row = gl.arange(0, R, gl.SliceLayout(1, layout))
    col = gl.arange(0, BW, gl.SliceLayout(0, layout))
    for r in gl.static_range(0, C, R):
        if r < tokens:
            inside = (row + r < tokens)[:, None] & (col < width)[None, :]
            gl.store(x + (row + r)[:, None] * stride + col[None, :], smem.slice(r, R).load(layout), mask=inside)


@gluon.constexpr_function
def main_part(width):
    """Columns of the first of two parts."""
    return 64 if width < 128 else 128


@gluon.jit
def store_state(base, state, state_rest, factor, column, shape, WIDTH: gl.constexpr, TILE: gl.constexpr,
                TRANSPOSED: gl.constexpr, COLUMNS_FIRST: gl.constexpr):  # fmt: skip
    """Write a program's part of a state, of one or two parts, times a factor."""
    MAIN: gl.constexpr = main_part(WIDTH)
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, MAIN, 16])
    col = column + gl.arange(0, TILE, gl.SliceLayout(1, layout))
    b_col = gl.arange(0, MAIN, gl.SliceLayout(0, layout))
    where, exists = state_pointers(base, b_col, col, shape, TRANSPOSED, COLUMNS_FIRST)
    gl.store(where, (state * factor).to(base.dtype.element_ty), mask=exists)
    if WIDTH > MAIN:
        rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH - MAIN, 16])
        b_col = MAIN + gl.arange(0, WIDTH - MAIN, gl.SliceLayout(0, rest_layout))
        col = column + gl.arange(0, TILE, gl.SliceLayout(1, rest_layout))
        where, exists = state_pointers(base, b_col, col, shape, TRANSPOSED, COLUMNS_FIRST)
        gl.store(where, (state_rest * factor).to(base.dtype.element_ty), mask=exists)


@gluon.jit
def weights(at, tokens, nearest, rate, C: gl.constexpr, LEFT: gl.constexpr, REVERSE: gl.constexpr,
            WIDE: gl.constexpr = False):  # fmt: skip
    """What is left of each row of a block at its end, λ^(m−1−r), or with time reversed at its beginning, λ^(r+1).

    Counted by a 0 that the compiler does not know: what is the same in every block it would keep in registers, 16 a
    thread, and spill others. One product, because the difference of two is fused in one kernel and not in another. The
    exponent of a row past the end is clamped; that row is zero.
    """
    row = gl.arange(0, C, gl.SliceLayout(0, LEFT))
    if WIDE:  # there one product spills 24 and 72 bytes
        to_end = rate * gl.maximum(tokens - 1 - row, 0).to(gl.float32)
        weight = gl.exp2(rate * tokens.to(gl.float32) - to_end if REVERSE else to_end)
    else:
        row = (tokens <= 0).to(gl.int32) + row
        weight = gl.exp2(rate * (row + 1 if REVERSE else gl.maximum(tokens - 1 - row, 0)).to(gl.float32))
    if nearest is not None:
        weight = gl.where(is_within(at + row, nearest, REVERSE), weight, 0.0)
    return weight


@gluon.jit
def weigh(c, weight, LEFT: gl.constexpr):
    """The columns of a block, a left operand, by a weight for each row."""
    return (c.permute((1, 0)).load(LEFT).to(gl.float32) * weight[None, :]).to(c.dtype)


@gluon.jit
def write_block(out, smem, o, rows, at, tokens, width, C: gl.constexpr, TILE: gl.constexpr, PACKED: gl.constexpr):
    """Write a block of the output, transposed in registers, by way of shared memory."""
    tma.store_wait(0)
    barrier()
    smem.reshape([C, TILE]).permute((1, 0)).store(o.to(smem.dtype))
    fence_async_shared()
    barrier()
    if PACKED and tokens < C:
        where = out.pointer + rows.batch * out.batch_stride + rows.head * width + rows.column
        store_tail(where + at.to(gl.int64) * out.row_stride, smem.reshape([C, TILE]), out.row_stride, tokens,
                   width - rows.column, C, TILE)  # fmt: skip
    else:
        copy_out(out.descriptor, [rows.batch, at, rows.head, rows.column], smem)


def read_tile(x: Tensor | None, view: TensorView, tiles: Tiles, width: int) -> tuple[Any, ...]:
    return (None if x is None else dispatch.Descriptor(x, view, tiles.C, width),)


def write(x: Tensor, view: TensorView, tiles: Tiles, width: int) -> tuple[Any, ...]:
    batch, row, _, _ = x.stride()
    return dispatch.Descriptor(x, view, tiles.C, width), x, batch, row
