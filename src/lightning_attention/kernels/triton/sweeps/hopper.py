"""The sweep for Hopper, in Gluon: what ``portable.py`` computes, with the copies and products placed by hand.

A program has four warps and keeps one part of the transposed state in registers. The tensor copy engine fills
two stages of shared memory; the state and the weighted columns of c are left operands from registers, so only the
scores (8 KB) and the outputs (8 KB) are written to shared memory. 96 KB and at most 255 registers a thread: two
programs fit on a multiprocessor, and one computes while the other waits. On an H200 at B 4, T 32768, H 32, D 128 that
is 0.93 of the floor forward, where three stages and so one program reach 0.83, and the same loop left to Triton's own
pipelining 0.75.
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lightning_attention.kernels.triton import dispatch, roles
from lightning_attention.kernels.triton.numerics import carried_units, power_below, what_is_lost
from lightning_attention.kernels.triton.roles import Operands, first_state, heads_read, state_pointers, widths
from lightning_attention.kernels.triton.sweeps.interface import Sweep
from lightning_attention.kernels.triton.tiling import TensorView, Tiles
from lightning_attention.kernels.triton.work import Pool, Segmentation, Shape

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
def fetch(a, b, c, a_smem, b_smem, c_smem, ready, stage, rows, b_head, c_head, start, pred, C: gl.constexpr,
          WIDTH: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """Start the copies of a block into its stage."""
    bar = ready.index(stage)
    mbarrier.expect(bar, C * ((0 if a is None else WIDTH) + WIDTH + TILE) * 2, pred=pred)
    copy_in(b, [rows.batch, start, b_head, 0], bar, b_smem.index(stage), pred=pred)
    if a is not None:
        copy_in(a, [rows.batch, start, b_head, 0], bar, a_smem.index(stage), pred=pred)
    copy_in(c, [rows.batch, start, c_head, rows.column], bar, c_smem.index(stage), pred=pred)


@gluon.jit
def clear_tail(smem, tokens, C: gl.constexpr, BW: gl.constexpr):
    """Zero the rows of a block past its ``tokens``: they are another sequence's, or padding that may hold anything."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BW, BW // 8], [gl.num_warps(), 1], [1, 0])
    R: gl.constexpr = 256 // BW * gl.num_warps()  # one vector a thread at a time: the loop has no registers to spare
    row = gl.arange(0, R, gl.SliceLayout(1, layout))
    for r in gl.static_range(0, C, R):
        if r + R > tokens:
            rows = smem.slice(r, R)
            rows.store(gl.where((row + r < tokens)[:, None], rows.load(layout), 0.0).to(smem.dtype))


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


@gluon.jit
def sweep(a, b, c, out, rows, begin, end, shape, rate, scale, TILES: gl.constexpr, PACKED: gl.constexpr,
          TRANSPOSED: gl.constexpr, REVERSE: gl.constexpr):  # fmt: skip
    """The loop, as ``roles.py`` calls it: from ``first_state`` to the state at ``end``.

    With time reversed the state is that of the rows after.
    """
    C: gl.constexpr = TILES.C
    WIDTH: gl.constexpr = TILES.BE if TRANSPOSED else TILES.BD
    TILE: gl.constexpr = TILES.TD if TRANSPOSED else TILES.TE
    STAGES: gl.constexpr = 2 * TILES.stages if a is None else TILES.stages  # without a there is room for twice as many
    dtype: gl.constexpr = b.dtype
    HALF: gl.constexpr = b.dtype == gl.float16
    _, c_width = widths(shape, TRANSPOSED)
    b_head, c_head = heads_read(rows, TILES, TRANSPOSED)
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    left_scores: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    left_state: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)

    b_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, WIDTH], b.layout)
    c_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, TILE], c.layout)
    a_smem = b_smem
    if a is not None:
        a_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, WIDTH], a.layout)
        p_smem = gl.allocate_shared_memory(dtype, [C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype))
        o_smem = gl.allocate_shared_memory(dtype, [1, C, 1, TILE], out.descriptor.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    barrier()

    stop = rows.stop
    blocks = (stop - rows.start + C - 1) // C
    first = rows.start
    step = C
    if REVERSE:
        first = rows.start + (blocks - 1) * C
        step = -C
    for s in gl.static_range(STAGES - 1):
        fetch(a, b, c, a_smem, b_smem, c_smem, ready, s, rows, b_head, c_head, first + s * step, s < blocks, C, WIDTH,
              TILE)  # fmt: skip

    col = rows.column + gl.arange(0, TILE, gl.SliceLayout(1, state_layout))
    b_col = gl.arange(0, WIDTH, gl.SliceLayout(0, state_layout))
    state = first_state(gl.zeros([TILE, WIDTH], gl.float32, state_layout), begin, b_col, col, shape, TRANSPOSED)
    unit, weight_scale = carried_units(rate, scale, HALF, REVERSE)
    if HALF and REVERSE:
        state *= gl.exp2(-unit)
    c_row = gl.arange(0, C, gl.SliceLayout(0, left_state))
    if a is not None:
        j = gl.arange(0, C, gl.SliceLayout(1, scores_layout))[:, None]
        i = gl.arange(0, C, gl.SliceLayout(0, scores_layout))[None, :]
        gap = (j - i) if REVERSE else (i - j)
        mask = gl.where(gap >= 0, gl.exp2(rate * gl.maximum(gap, 0).to(gl.float32)) * scale, 0.0)
        out_row = gl.arange(0, C, gl.SliceLayout(0, scores_layout))
        nothing = gl.zeros([TILE, C], gl.float32, scores_layout)
        no_scores = gl.zeros([C, C], gl.float32, scores_layout)

    lost_in_whole = what_is_lost(rate, C)
    stage = 0
    phase = 0
    for n in range(blocks):
        at = first + n * step
        tokens = gl.minimum(stop - at, C)
        b_block = b_smem.index(stage).reshape([C, WIDTH])
        c_block = c_smem.index(stage).reshape([C, TILE])
        mbarrier.wait(ready.index(stage), phase)
        if PACKED:
            if tokens < C:
                clear_tail(b_block, tokens, C, WIDTH)
                clear_tail(c_block, tokens, C, TILE)
                fence_async_shared()
                barrier()
        if a is not None:
            a_block = a_smem.index(stage).reshape([C, WIDTH]).permute((1, 0))
            scores = warpgroup_mma(b_block, a_block, no_scores, use_acc=False, is_async=True)

        # The stage before this one is free: what read it last was the product that made ``state``.
        ahead = n + STAGES - 1
        last = stage - 1 + (stage == 0).to(gl.int32) * STAGES
        fetch(a, b, c, a_smem, b_smem, c_smem, ready, last, rows, b_head, c_head, first + ahead * step, ahead < blocks,
              C, WIDTH, TILE)  # fmt: skip
        if a is not None:
            if HALF:  # rows of the state, each times a power of two that makes it fit
                power, inverse = power_below(gl.max(gl.abs(state), 1))
                left = gl.convert_layout((state * inverse[:, None]).to(dtype), left_scores)
            else:
                left = gl.convert_layout(state.to(dtype), left_scores)
            o = warpgroup_mma(left, a_block, nothing, use_acc=False, is_async=True)

        # λ^(m−1−r), or λ^(r+1) as λ^m over it: the same in every block, that would be kept in registers, 16 a thread,
        # which Triton 3.6 and 3.8 then spill. The exponent of a row past the end is clamped; that row of c is zero.
        across = rate * tokens.to(gl.float32)
        to_end = rate * gl.maximum(tokens - 1 - c_row, 0).to(gl.float32)
        weight = gl.exp2(across - to_end if REVERSE else to_end) * weight_scale
        weighted = (c_block.permute((1, 0)).load(left_state).to(gl.float32) * weight[None, :]).to(dtype)

        if a is not None:
            scores = warpgroup_mma_wait(1, deps=[scores])
            p_smem.store((scores * mask).to(dtype))
            fence_async_shared()
            barrier()
            o = warpgroup_mma_wait(0, deps=[o])
            if HALF:
                o = o * gl.convert_layout(power, gl.SliceLayout(1, scores_layout))[:, None]
            to_end = rate * gl.maximum(tokens - 1 - out_row, 0).to(gl.float32)
            if REVERSE:
                o = o * gl.exp2(to_end + unit)[None, :]
            else:
                o = o * (gl.exp2(across - to_end) * scale)[None, :]
            o = warpgroup_mma(c_block.permute((1, 0)), p_smem, o, is_async=True)
        # One product and sum a number; that it rounds a decay near 0 does not matter in 16 bits.
        lost = lost_in_whole
        if tokens < C:
            lost = what_is_lost(rate, tokens)
        state = warpgroup_mma(weighted, b_block, state + state * lost, is_async=True)
        if a is not None:
            o = warpgroup_mma_wait(1, deps=[o])
            tma.store_wait(0)
            barrier()
            o_smem.reshape([C, TILE]).permute((1, 0)).store(o.to(dtype))
            fence_async_shared()
            barrier()
            if PACKED and tokens < C:
                where = out.pointer + rows.batch * out.batch_stride + rows.head * c_width + rows.column
                store_tail(where + at.to(gl.int64) * out.row_stride, o_smem.reshape([C, TILE]), out.row_stride, tokens,
                           c_width - rows.column, C, TILE)  # fmt: skip
            else:
                copy_out(out.descriptor, [rows.batch, at, rows.head, rows.column], o_smem)
        state = warpgroup_mma_wait(0, deps=[state])
        barrier()  # every warp is done with this stage: the next turn starts a copy into it
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if a is not None:
        tma.store_wait(0)
    barrier()
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(s))  # another segment's may be made in the same place
    if end.final is not None:
        if end.is_stored:
            left, exists = state_pointers(end.final + end.final_offset, b_col, col, shape, TRANSPOSED)
            state *= gl.exp2(unit)
            gl.store(left, state.to(end.final.dtype.element_ty), mask=exists)


@dispatch.unspecialized(gluon.jit)
def forward_kernel(q, k, v, out, out_pointer, out_batch_stride: "i64", out_row_stride, log_decay, initial, final,
                   state_slot_stride: "i64", state_head_stride: "i64", slots, fresh, boundary_states, segment_table,
                   segments_per_sequence, segment_rows, segment_count, T, H, D, E, scale, TILES: gl.constexpr,
                   PERSISTENT: gl.constexpr):  # fmt: skip
    roles.forward(sweep, q, k, v, Output(out, out_pointer, out_batch_stride, out_row_stride), log_decay,
                  Pool(initial, final, state_slot_stride, state_head_stride, slots, fresh), boundary_states,
                  Segmentation(segment_table, segments_per_sequence, segment_rows), Shape(T, H, D, E), scale,
                  segment_count, TILES, PERSISTENT)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def backward_kernel(q, k, v, dout, q_tile, k_tile, dout_tile, dq, dq_pointer, dq_batch_stride: "i64", dq_row_stride, dk,
                    dk_pointer, dk_batch_stride: "i64", dk_row_stride, dv, dv_pointer, dv_batch_stride: "i64",
                    dv_row_stride, log_decay, initial, dfinal, dinitial, states_before, grads_after, segment_table,
                    segments_per_sequence, segment_rows, T, H, D, E, scale, TILES: gl.constexpr):  # fmt: skip
    roles.backward(sweep, Operands(q, k, v, dout), Operands(q_tile, k_tile, None, dout_tile),
                   Output(dq, dq_pointer, dq_batch_stride, dq_row_stride),
                   Output(dk, dk_pointer, dk_batch_stride, dk_row_stride),
                   Output(dv, dv_pointer, dv_batch_stride, dv_row_stride), log_decay, initial, dfinal, dinitial,
                   states_before, grads_after, Segmentation(segment_table, segments_per_sequence, segment_rows),
                   Shape(T, H, D, E), scale, TILES)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def states_kernel(k, v, q, dout, log_decay, local_before, local_after, final, segment_table, segments_per_sequence,
                  segment_rows, piece_rows, piece_count, T, H, D, E, scale, TILES: gl.constexpr,
                  PERSISTENT: gl.constexpr):  # fmt: skip
    roles.states(sweep, k, v, q, dout, log_decay, local_before, local_after, final,
                 Segmentation(segment_table, segments_per_sequence, segment_rows), piece_rows, Shape(T, H, D, E), scale,
                 piece_count, TILES, PERSISTENT)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def snapshot_kernel(k, v, log_decay, pool, state_slot_stride: "i64", state_head_stride: "i64", slots, fresh,
                    boundary_states, cu_seqlens, first_boundary, snapshot_at, snapshot_slots, per_sequence,
                    segment_rows, T, H, D, E, TILES: gl.constexpr):  # fmt: skip
    roles.snapshot(sweep, k, v, log_decay, Pool(pool, pool, state_slot_stride, state_head_stride, slots, fresh),
                   boundary_states, cu_seqlens, first_boundary, snapshot_at, snapshot_slots, per_sequence, segment_rows,
                   Shape(T, H, D, E), TILES)  # fmt: skip


def read(x: Tensor | None, view: TensorView, tiles: Tiles, width: int) -> tuple[Any, ...]:
    return (None if x is None else dispatch.Descriptor(x, view, tiles.C, width),)


def write(x: Tensor, view: TensorView, tiles: Tiles, width: int) -> tuple[Any, ...]:
    batch, row, _, _ = x.stride()
    return dispatch.Descriptor(x, view, tiles.C, width), x, batch, row


SWEEP = Sweep(forward_kernel, backward_kernel, states_kernel, snapshot_kernel, read, read, write, dispatch.run)
