"""The sweep for Hopper, in Gluon: what ``portable.py`` computes, with the copies and products placed by hand.

A program keeps its part of the transposed state in registers. The tensor copy engine fills two stages of shared memory
or more; the state and the weighted columns of c are left operands from registers, so only the scores (8 KB) and the
outputs are written to shared memory. With four warps, 64 columns and 96 KB two programs fit on a multiprocessor, and
one computes while the other waits. On an H200 at B 4, T 32768, H 32, D 128 that is 0.93 to 0.97 of the floor forward,
by card, where three stages and so one program reach 0.83, and the same loop left to Triton's own pipelining 0.75. With
eight warps a program has 128 columns, and each warpgroup half of the scores.
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
from lightning_attention.kernels.triton.sweeps.hopper_blocks import (
    Output,
    barrier,
    borders_of,
    clear_tail,
    copy_in,
    keep_documents,
    keep_passing,
    main_part,
    order_of_blocks,
    read_tile,
    store_state,
    weigh,
    weights,
    write,
    write_block,
)
from lightning_attention.kernels.triton.sweeps.interface import Sweep
from lightning_attention.kernels.triton.tiling import TensorView, Tiles
from lightning_attention.kernels.triton.work import (
    Pool,
    Segmentation,
    Shape,
    is_past,
    is_within,
)


class Input(NamedTuple):
    """A tensor [B, T, H, width] that is read by all of its columns, in two parts: a matrix has a power of two of them.

    192 is 128 and 64. ``rest`` is None where there is one part.
    """

    main: gl.tensor
    rest: gl.tensor


class Buffers(NamedTuple):
    """Stages of shared memory, of b, a, c and the decay gradient's partner, and what says that copies have come."""

    b: gl.tensor
    b_rest: gl.tensor
    a: gl.tensor
    a_rest: gl.tensor
    c: gl.tensor
    partner: gl.tensor
    ready: gl.tensor


@gluon.jit
def fetch(a, b, c, decay_grad, smem, stage, rows, b_head, c_head, start, pred, C: gl.constexpr, WIDTH: gl.constexpr,
          TILE: gl.constexpr, OUTPUT: gl.constexpr):  # fmt: skip
    """Start the copies of a block into its stage."""
    MAIN: gl.constexpr = main_part(WIDTH)
    bar = smem.ready.index(stage)
    columns: gl.constexpr = WIDTH + TILE + (WIDTH if OUTPUT else 0) + (0 if decay_grad is None else TILE)
    mbarrier.expect(bar, C * columns * 2, pred=pred)
    copy_in(b.main, [rows.batch, start, b_head, 0], bar, smem.b.index(stage), pred=pred)
    if WIDTH > MAIN:
        copy_in(b.rest, [rows.batch, start, b_head, MAIN], bar, smem.b_rest.index(stage), pred=pred)
    if OUTPUT:
        copy_in(a.main, [rows.batch, start, b_head, 0], bar, smem.a.index(stage), pred=pred)
        if WIDTH > MAIN:
            copy_in(a.rest, [rows.batch, start, b_head, MAIN], bar, smem.a_rest.index(stage), pred=pred)
    copy_in(c, [rows.batch, start, c_head, rows.column], bar, smem.c.index(stage), pred=pred)
    if decay_grad is not None:
        copy_in(decay_grad.partner, [rows.batch, start, c_head, rows.column], bar, smem.partner.index(stage), pred=pred)


@gluon.jit
def left_operand(state, inverse, dtype: gl.constexpr, LEFT: gl.constexpr):
    """A part of the state for a product, its rows times ``inverse``, if that is given."""
    layout: gl.constexpr = state.type.layout
    if inverse is not None:
        state = state * gl.convert_layout(inverse, gl.SliceLayout(1, layout))[:, None]
    if gl.num_warps() == 8 and dtype == gl.bfloat16:
        # What reads a product's registers while another is under way waits for that one. The compiler may move .to() to
        # where it does; not this. With four warps the second program fills the gap.
        state = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [state], gl.bfloat16, False, 2)
    return gl.convert_layout(state.to(dtype), LEFT)


@gluon.jit
def sweep(a, b, c, out, decay_grad, rows, begin, end, shape, rate, scale, TILES: gl.constexpr, PACKED: gl.constexpr,
          TRANSPOSED: gl.constexpr, REVERSE: gl.constexpr):  # fmt: skip
    """The loop, as ``roles.py`` calls it: from ``first_state`` to the state at ``end``.

    With time reversed the state is that of the rows after.
    """
    C: gl.constexpr = TILES.C
    WIDTH: gl.constexpr = TILES.BE if TRANSPOSED else TILES.BD
    MAIN: gl.constexpr = main_part(WIDTH)
    REST: gl.constexpr = WIDTH - MAIN
    TILE: gl.constexpr = TILES.TD if TRANSPOSED else TILES.TE
    OUTPUT: gl.constexpr = out is not None
    # Without a there is room for twice as many stages, or nearly.
    MORE: gl.constexpr = min(2 * TILES.stages, (217 << 10) // (2 * TILES.C * (WIDTH + TILE)))
    STAGES: gl.constexpr = TILES.stages if OUTPUT else MORE
    WIDE: gl.constexpr = WIDTH > 128
    DERIVED: gl.constexpr = decay_grad is not None and REVERSE
    LATE: gl.constexpr = WIDE or DERIVED
    BORDERS: gl.constexpr = rows.borders is not None
    dtype: gl.constexpr = c.dtype
    HALF: gl.constexpr = c.dtype == gl.float16
    WARPS: gl.constexpr = gl.num_warps()
    _, c_width = widths(shape, TRANSPOSED)
    b_head, c_head = heads_read(rows, TILES, TRANSPOSED)
    # Every four warps have 64 rows of a product, so 64 columns of c; of the scores, which have 64 rows, some columns.
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, C * 4 // WARPS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, MAIN, 16])
    left_out: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    left_state: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)

    b_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, MAIN], b.main.layout)
    c_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, TILE], c.layout)
    a_smem = b_smem
    b_rest_smem = b_smem
    a_rest_smem = b_smem
    if REST > 0:
        rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, REST, 16])
        left_rest: gl.constexpr = gl.DotOperandLayout(0, rest_layout, 2)
        b_rest_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, REST], b.rest.layout)
    if OUTPUT:
        a_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, MAIN], a.main.layout)
        if REST > 0:
            a_rest_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, REST], a.rest.layout)
        p_smem = gl.allocate_shared_memory(dtype, [C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype))
        o_smem = gl.allocate_shared_memory(dtype, [1, C, 1, TILE], out.descriptor.layout)
    partner_smem = b_smem
    if decay_grad is not None:
        partner_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, TILE], c.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    barrier()
    if BORDERS:
        border_smem = gl.allocate_shared_memory(gl.int32, [2, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        line = gl.arange(0, C, gl.BlockedLayout([1], [32], [WARPS], [0]))
    smem = Buffers(b_smem, b_rest_smem, a_smem, a_rest_smem, c_smem, partner_smem, ready)

    stop = rows.stop
    blocks, first, step = order_of_blocks(rows, C, REVERSE)
    for s in gl.static_range(STAGES - 1):
        fetch(a, b, c, decay_grad, smem, s, rows, b_head, c_head, first + s * step, s < blocks, C, WIDTH, TILE, OUTPUT)

    col = rows.column + gl.arange(0, TILE, gl.SliceLayout(1, state_layout))
    b_col = gl.arange(0, MAIN, gl.SliceLayout(0, state_layout))
    state = first_state(gl.zeros([TILE, MAIN], gl.float32, state_layout), begin, b_col, col, shape, TRANSPOSED,
                        TILES.columns_first)  # fmt: skip
    if REST > 0:
        rest_col = rows.column + gl.arange(0, TILE, gl.SliceLayout(1, rest_layout))
        b_rest_col = MAIN + gl.arange(0, REST, gl.SliceLayout(0, rest_layout))
        nought = gl.zeros([TILE, REST], gl.float32, rest_layout)
        state_rest = first_state(nought, begin, b_rest_col, rest_col, shape, TRANSPOSED, TILES.columns_first)
    else:
        state_rest = state
    unit, weight_scale = carried_units(rate, scale, HALF, REVERSE)
    if HALF and REVERSE:
        state *= gl.exp2(-unit)
        if REST > 0:
            state_rest *= gl.exp2(-unit)
    if OUTPUT:
        j = gl.arange(0, C, gl.SliceLayout(1, scores_layout))[:, None]
        score_row = gl.arange(0, C, gl.SliceLayout(0, scores_layout))
        gap = (j - score_row[None, :]) if REVERSE else (score_row[None, :] - j)
        mask = gl.where(gap >= 0, gl.exp2(rate * gl.maximum(gap, 0).to(gl.float32)) * scale, 0.0)
        out_row = gl.arange(0, C, gl.SliceLayout(0, out_layout))
        nothing = gl.zeros([TILE, C], gl.float32, out_layout)
        no_scores = gl.zeros([C, C], gl.float32, scores_layout)
    if decay_grad is not None:
        crossing = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, out_layout))
        if REVERSE:
            no_part = gl.zeros([TILE, MAIN], gl.float32, state_layout)
            derivative = no_part
            met = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, state_layout))
            if REST > 0:
                no_rest = gl.zeros([TILE, REST], gl.float32, rest_layout)
                derivative_rest = no_rest
        else:
            no_lag = gl.zeros([C, C], gl.float32, scores_layout).reshape([C, WARPS // 4, C * 4 // WARPS])
            lagging = gl.sum(no_lag, 2)

    if BORDERS:
        borders_first, nearest = borders_of(rows, first, line, C, REVERSE)
        border_smem.index(0).store(borders_first)
        barrier()
    else:
        nearest = None
    lost_in_whole = what_is_lost(rate, C)
    stage = 0
    phase = 0
    for n in range(blocks):
        at = first + n * step
        tokens = gl.minimum(stop - at, C)
        b_block = b_smem.index(stage).reshape([C, MAIN])
        c_block = c_smem.index(stage).reshape([C, TILE])
        if REST > 0:
            b_rest = b_rest_smem.index(stage).reshape([C, REST])
        if BORDERS:
            is_kept = is_past(nearest, at, at + tokens, REVERSE)
            following = gl.minimum(gl.maximum(at + step, rows.start), stop - 1)  # loaded a block ahead
            borders_ahead, nearest_ahead = borders_of(rows, following, line, C, REVERSE)
        if OUTPUT:
            if HALF:  # rows of the state, each times a power of two that makes it fit
                largest = gl.max(gl.abs(state), 1)
                if REST > 0:
                    of_rest = gl.max(gl.abs(state_rest), 1)
                    largest = gl.maximum(largest, gl.convert_layout(of_rest, gl.SliceLayout(1, state_layout)))
                power, inverse = power_below(largest)
            else:
                inverse = None
            left = left_operand(state, inverse, dtype, left_out)
            if REST > 0 and not WIDE:
                left_of_rest = left_operand(state_rest, inverse, dtype, left_out)
        mbarrier.wait(ready.index(stage), phase)
        if PACKED:
            if tokens < C:
                clear_tail(b_block, tokens, C, MAIN)
                if REST > 0:
                    clear_tail(b_rest, tokens, C, REST)
                clear_tail(c_block, tokens, C, TILE)
                if decay_grad is not None:
                    clear_tail(a_smem.index(stage).reshape([C, MAIN]), tokens, C, MAIN)
                    if REST > 0:
                        clear_tail(a_rest_smem.index(stage).reshape([C, REST]), tokens, C, REST)
                    clear_tail(partner_smem.index(stage).reshape([C, TILE]), tokens, C, TILE)
                fence_async_shared()
                barrier()
        if OUTPUT:
            a_block = a_smem.index(stage).reshape([C, MAIN]).permute((1, 0))
            scores = warpgroup_mma(b_block, a_block, no_scores, use_acc=False, is_async=True)
            if REST > 0:
                a_rest = a_rest_smem.index(stage).reshape([C, REST]).permute((1, 0))
                scores = warpgroup_mma(b_rest, a_rest, scores, is_async=True)
            if decay_grad is not None:
                partner = partner_smem.index(stage).reshape([C, TILE]).permute((1, 0))
                if not REVERSE:
                    within = warpgroup_mma(c_block, partner, no_scores, use_acc=False, is_async=True)

        # The stage before this one is free: what read it last was the product that made ``state``.
        # Further up, before the products, it costs a tenth: what barriers each copy has would not be hidden by them.
        ahead = n + STAGES - 1
        last = stage - 1 + (stage == 0).to(gl.int32) * STAGES
        fetch(a, b, c, decay_grad, smem, last, rows, b_head, c_head, first + ahead * step, ahead < blocks, C, WIDTH,
              TILE, OUTPUT)  # fmt: skip
        if OUTPUT:
            o = warpgroup_mma(left, a_block, nothing, use_acc=False, is_async=True)
            if REST > 0 and not WIDE:
                o = warpgroup_mma(left_of_rest, a_rest, o, is_async=True)

        if not LATE:
            weight = weights(at, tokens, nearest, rate, C, left_state, REVERSE, WIDE) * weight_scale
            weighted = weigh(c_block, weight, left_state)

        if OUTPUT:
            scores = warpgroup_mma_wait(2 if REST > 0 and not WIDE else 1, deps=[scores])
            if DERIVED:  # Two states leave no registers for it: it is made anew, by a 0 that the compiler doesn't know.
                gap = j - (score_row + (tokens <= 0).to(gl.int32))[None, :]
                mask = gl.where(gap >= 0, gl.exp2(rate * gl.maximum(gap, 0).to(gl.float32)) * scale, 0.0)
            p = scores * mask
            if decay_grad is not None and not REVERSE:
                within = warpgroup_mma_wait(2 if REST > 0 and not WIDE else 1, deps=[within])
                lag = p * within * gap.to(gl.float32)
                if BORDERS:
                    of_row = border_smem.index(n % 2).load(gl.SliceLayout(0, scores_layout))
                    lag = gl.where(is_within(at + j, of_row[None, :], REVERSE), lag, 0.0)
                lagging += gl.sum(lag.reshape([C, WARPS // 4, C * 4 // WARPS]), 2)
            p_smem.store(p.to(dtype))
            if BORDERS:
                if not is_kept:  # the block has rows of several documents, or of one that begins or ends with it
                    barrier()
                    keep_documents(p_smem, border_smem.index(n % 2), at, C, REVERSE)
                    if DERIVED:
                        keep_passing(partner_smem.index(stage).reshape([C, TILE]), border_smem.index(n % 2), at,
                                     at + tokens, C, TILE, REVERSE)  # fmt: skip
            fence_async_shared()
            barrier()
            o = warpgroup_mma_wait(0, deps=[o])
            if WIDE:  # one part after the other: the state takes half of the registers
                left = left_operand(state_rest, inverse, dtype, left_out)
                o = warpgroup_mma(left, a_rest, o, is_async=True)
                o = warpgroup_mma_wait(0, deps=[o])
            if HALF:
                o = o * gl.convert_layout(power, gl.SliceLayout(1, out_layout))[:, None]
            to_end = rate * gl.maximum(tokens - 1 - out_row, 0).to(gl.float32)
            if REVERSE:
                o = o * gl.exp2(to_end + unit)[None, :]
            else:
                o = o * (gl.exp2(rate * tokens.to(gl.float32) - to_end) * scale)[None, :]
            if BORDERS:
                if not is_kept:
                    border = border_smem.index(n % 2).load(gl.SliceLayout(0, out_layout))
                    o = gl.where(is_past(border, at, at + tokens, REVERSE)[None, :], o, 0.0)
            if decay_grad is not None:  # what is sent on past the edge of the block, or got from there
                sent_on = o * gl.convert_layout(partner.load(left_out), out_layout).to(gl.float32)
                lag = gl.maximum(tokens - 1 - out_row, 0) if REVERSE else out_row + 1
                crossing += gl.sum(sent_on * lag.to(gl.float32)[None, :], 1)
            o = warpgroup_mma(c_block.permute((1, 0)), p_smem, o, is_async=True)
        # One product and sum a number; that it rounds a decay near 0 does not matter in 16 bits.
        lost = lost_in_whole
        if tokens < C:
            lost = what_is_lost(rate, tokens)
        if DERIVED:
            o = warpgroup_mma_wait(0, deps=[o])
            write_block(out, o_smem, o, rows, at, tokens, c_width, C, TILE, PACKED)
            leaving = weights(at, tokens, None, rate, C, left_state, False)
            left = weigh(partner_smem.index(stage).reshape([C, TILE]), leaving, left_state)
            part = warpgroup_mma(left, a_smem.index(stage).reshape([C, MAIN]), no_part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=[part])
            met += gl.sum(derivative * part, 1)
            derivative = derivative + state * tokens.to(gl.float32)
            derivative = derivative + derivative * lost
            if REST > 0:
                left = gl.convert_layout(left, left_rest)
                part_rest = warpgroup_mma(left, a_rest_smem.index(stage).reshape([C, REST]), no_rest, use_acc=False,
                                          is_async=True)  # fmt: skip
                part_rest = warpgroup_mma_wait(0, deps=[part_rest])
                met += gl.convert_layout(gl.sum(derivative_rest * part_rest, 1), gl.SliceLayout(1, state_layout))
                derivative_rest = derivative_rest + state_rest * tokens.to(gl.float32)
                derivative_rest = derivative_rest + derivative_rest * lost
        if LATE:
            weight = weights(at, tokens, nearest, rate, C, left_state, REVERSE, WIDE) * weight_scale
            weighted = weigh(c_block, weight, left_state)
        if BORDERS:
            if not is_kept:
                state = gl.zeros([TILE, MAIN], gl.float32, state_layout)
                if REST > 0:
                    state_rest = gl.zeros([TILE, REST], gl.float32, rest_layout)
                if DERIVED:
                    derivative = gl.zeros([TILE, MAIN], gl.float32, state_layout)
                    if REST > 0:
                        derivative_rest = gl.zeros([TILE, REST], gl.float32, rest_layout)
        state = warpgroup_mma(weighted, b_block, state + state * lost, is_async=True)
        if REST > 0:
            left = gl.convert_layout(weighted, left_rest)
            state_rest = warpgroup_mma(left, b_rest, state_rest + state_rest * lost, is_async=True)
        if OUTPUT and not DERIVED:
            o = warpgroup_mma_wait(2 if REST > 0 else 1, deps=[o])
            write_block(out, o_smem, o, rows, at, tokens, c_width, C, TILE, PACKED)
        if REST > 0:
            state, state_rest = warpgroup_mma_wait(0, deps=[state, state_rest])
        else:
            state = warpgroup_mma_wait(0, deps=[state])
        if BORDERS:
            border_smem.index((n + 1) % 2).store(borders_ahead)
            nearest = nearest_ahead
        barrier()  # every warp is done with this stage: the next turn starts a copy into it
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if OUTPUT:
        tma.store_wait(0)
    barrier()
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(s))  # another segment's may be made in the same place
    if decay_grad is not None:
        total = gl.sum(crossing, 0)
        if REVERSE:
            if decay_grad.is_entered:
                where, exists = state_pointers(decay_grad.entered, b_col, col, shape, TRANSPOSED)
                met += gl.sum(derivative * gl.load(where, mask=exists, other=0.0), 1)
                if REST > 0:
                    where, exists = state_pointers(decay_grad.entered, b_rest_col, rest_col, shape, TRANSPOSED)
                    of_rest = gl.sum(derivative_rest * gl.load(where, mask=exists, other=0.0), 1)
                    met += gl.convert_layout(of_rest, gl.SliceLayout(1, state_layout))
            total += gl.sum(met, 0) * gl.exp2(unit)
        else:
            total += gl.sum(gl.sum(lagging, 1), 0)
        gl.store(decay_grad.sum, total)
    if end.final is not None:
        if end.is_stored:
            store_state(end.final + end.final_offset, state, state_rest, gl.exp2(unit), rows.column, shape, WIDTH, TILE,
                        TRANSPOSED, TILES.columns_first)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def forward_kernel(q, q_rest, k, k_rest, v, out, out_pointer, out_batch_stride: "i64", out_row_stride, log_decay,
                   initial, final, state_slot_stride: "i64", state_head_stride: "i64", slots, fresh, boundary_states,
                   segment_table, segments_per_sequence, segment_rows, begins, ends, segment_count, T, H, D, E, scale,
                   TILES: gl.constexpr, PERSISTENT: gl.constexpr):  # fmt: skip
    roles.forward(sweep, Input(q, q_rest), Input(k, k_rest), v,
                  Output(out, out_pointer, out_batch_stride, out_row_stride), log_decay,
                  Pool(initial, final, state_slot_stride, state_head_stride, slots, fresh), boundary_states,
                  Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends), Shape(T, H, D, E),
                  scale, segment_count, TILES, PERSISTENT)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def backward_kernel(q, q_rest, k, k_rest, v, v_rest, dout, dout_rest, q_tile, k_tile, dout_tile, dq, dq_pointer,
                    dq_batch_stride: "i64", dq_row_stride, dk, dk_pointer, dk_batch_stride: "i64", dk_row_stride, dv,
                    dv_pointer, dv_batch_stride: "i64", dv_row_stride, log_decay, initial, dfinal, dinitial,
                    states_before, grads_after, decay_sums, segment_table,
                    segments_per_sequence, segment_rows, begins, ends, T, H, D, E, scale,
                    TILES: gl.constexpr):  # fmt: skip
    whole = Operands(Input(q, q_rest), Input(k, k_rest), Input(v, v_rest), Input(dout, dout_rest))
    roles.backward(sweep, whole, Operands(q_tile, k_tile, None, dout_tile),
                   Output(dq, dq_pointer, dq_batch_stride, dq_row_stride),
                   Output(dk, dk_pointer, dk_batch_stride, dk_row_stride),
                   Output(dv, dv_pointer, dv_batch_stride, dv_row_stride), log_decay, initial, dfinal, dinitial,
                   states_before, grads_after, decay_sums,
                   Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends), Shape(T, H, D, E),
                   scale, TILES)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def states_kernel(k, k_rest, v, q, q_rest, dout, log_decay, local_before, local_after, final, segment_table,
                  segments_per_sequence, segment_rows, begins, ends, piece_rows, last_piece_rows, piece_count, T, H, D,
                  E, scale, TILES: gl.constexpr, PERSISTENT: gl.constexpr):  # fmt: skip
    roles.states(sweep, Input(k, k_rest), v, Input(q, q_rest), dout, log_decay, local_before, local_after, final,
                 Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends), piece_rows,
                 last_piece_rows,
                 Shape(T, H, D, E), scale, piece_count, TILES, PERSISTENT)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def snapshot_kernel(k, k_rest, v, log_decay, pool, state_slot_stride: "i64", state_head_stride: "i64", slots, fresh,
                    boundary_states, cu_seqlens, first_boundary, snapshot_at, snapshot_slots, per_sequence,
                    segment_rows, T, H, D, E, TILES: gl.constexpr):  # fmt: skip
    roles.snapshot(sweep, Input(k, k_rest), v, log_decay,
                   Pool(pool, pool, state_slot_stride, state_head_stride, slots, fresh),
                   boundary_states, cu_seqlens, first_boundary, snapshot_at, snapshot_slots, per_sequence, segment_rows,
                   Shape(T, H, D, E), TILES)  # fmt: skip


def read(x: Tensor | None, view: TensorView, tiles: Tiles, width: int) -> tuple[Any, ...]:
    if x is None:
        return None, None
    main = main_part(width)
    rest = dispatch.Descriptor(x, view, tiles.C, width - main) if width > main else None
    return dispatch.Descriptor(x, view, tiles.C, main), rest


SWEEP = Sweep(
    forward_kernel, backward_kernel, states_kernel, snapshot_kernel, read, read_tile, read_tile, write, dispatch.run
)
