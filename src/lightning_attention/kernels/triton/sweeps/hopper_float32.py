"""The sweep for float32 on Hopper, in Gluon: what ``portable.py`` computes, by products of bfloat16 numbers.

Hopper's matrix units read 32-bit operands from shared memory along K alone, and of the four products of a block two
want theirs the other way. So every number is taken as a sum of bfloat16 numbers, which have float32's range and may lie
either way: where TF32 is allowed of two (16 bits), whose three largest products count; else of three (24 bits) and
six. Small products come first: the units cut off what a sum has no room for.

While a block is multiplied, the copy engine brings the next one. Its parts of a and b are written beside it; those of
the state, of c and of weighted c are left operands from registers, and those of the scores take the place of a's. A
block of the output leaves from where c lay.
"""

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
from lightning_attention.kernels.triton.numerics import advance, carried_units, whole_and_rest
from lightning_attention.kernels.triton.roles import Operands, first_state, heads_read, widths
from lightning_attention.kernels.triton.sweeps.hopper_blocks import (
    Output,
    barrier,
    borders_of,
    copy_in,
    order_of_blocks,
    read_tile,
    store_state,
    write,
    write_block,
)
from lightning_attention.kernels.triton.sweeps.interface import Sweep
from lightning_attention.kernels.triton.work import Pool, Segmentation, Shape, is_past, is_within

#: Two numbers at once. Triton converts the first part one number at a time, which takes a warp eight cycles (F2F), and
#: at 128 a thread had 208 of them a block.
TWO_PARTS = gl.constexpr("""{
    .reg .b32 a, b;
    cvt.rn.bf16x2.f32 $0, $3, $2;
    shl.b32 a, $0, 16;
    and.b32 b, $0, 0xffff0000;
    sub.f32 a, $2, a;
    sub.f32 b, $3, b;
    cvt.rn.bf16x2.f32 $1, b, a;
}""")
THREE_PARTS = gl.constexpr("""{
    .reg .b32 a, b, c, d;
    cvt.rn.bf16x2.f32 $0, $4, $3;
    shl.b32 a, $0, 16;
    and.b32 b, $0, 0xffff0000;
    sub.f32 a, $3, a;
    sub.f32 b, $4, b;
    cvt.rn.bf16x2.f32 $1, b, a;
    shl.b32 c, $1, 16;
    and.b32 d, $1, 0xffff0000;
    sub.f32 c, a, c;
    sub.f32 d, b, d;
    cvt.rn.bf16x2.f32 $2, d, c;
}""")


@gluon.jit
def parts_of(x, THREE: gl.constexpr):
    """x as a sum of bfloat16 numbers, the largest first; the third is there for three alone."""
    if THREE:
        high, middle, low = gl.inline_asm_elementwise(
            THREE_PARTS, "=&r,=&r,=&r,r,r", [x], (gl.bfloat16, gl.bfloat16, gl.bfloat16), True, 2
        )
    else:
        high, middle = gl.inline_asm_elementwise(TWO_PARTS, "=&r,=&r,r,r", [x], (gl.bfloat16, gl.bfloat16), True, 2)
        low = middle
    return high, middle, low


@gluon.jit
def left_parts(x, LEFT: gl.constexpr, THREE: gl.constexpr):
    """The parts as left operands."""
    high, middle, low = parts_of(x, THREE)
    high = gl.convert_layout(high, LEFT)
    middle = gl.convert_layout(middle, LEFT)
    if THREE:
        low = gl.convert_layout(low, LEFT)
    else:
        low = middle
    return high, middle, low


@gluon.jit
def store_parts(x, smem, THREE: gl.constexpr):
    high, middle, low = parts_of(x, THREE)
    smem[0].store(high)
    smem[1].store(middle)
    if THREE:
        smem[2].store(low)


@gluon.jit
def split_block(block, smem, tokens, C: gl.constexpr, WIDTH: gl.constexpr, PACKED: gl.constexpr, THREE: gl.constexpr):
    """Write the parts of a block that has come; its rows past ``tokens`` are another sequence's, or hold anything."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WIDTH, WIDTH // 4], [gl.num_warps(), 1], [1, 0])
    x = block.reshape([C, WIDTH]).load(layout)
    if PACKED:
        row = gl.arange(0, C, gl.SliceLayout(1, layout))
        x = gl.where((row < tokens)[:, None], x, 0.0)
    store_parts(x, smem, THREE)


@gluon.jit
def multiply(left, right, sum, THREE: gl.constexpr, ADD: gl.constexpr):
    """Start the products of two numbers' parts, smallest first: added to ``sum``, or instead of it."""
    high, middle, low = left
    of_high, of_middle, of_low = right
    if THREE:
        sum = warpgroup_mma(low, of_high, sum, use_acc=ADD, is_async=True)
        sum = warpgroup_mma(high, of_low, sum, is_async=True)
        sum = warpgroup_mma(middle, of_middle, sum, is_async=True)
    sum = warpgroup_mma(middle, of_high, sum, use_acc=ADD or THREE, is_async=True)
    sum = warpgroup_mma(high, of_middle, sum, is_async=True)
    return warpgroup_mma(high, of_high, sum, is_async=True)


@gluon.jit
def fetch(a, b, a_smem, b_smem, bar, rows, head, start, pred, C: gl.constexpr, WIDTH: gl.constexpr,
          OUTPUT: gl.constexpr):  # fmt: skip
    """Start the copies of a block of a and b."""
    mbarrier.expect(bar, C * WIDTH * (8 if OUTPUT else 4), pred=pred)
    copy_in(b, [rows.batch, start, head, 0], bar, b_smem, pred=pred)
    if OUTPUT:
        copy_in(a, [rows.batch, start, head, 0], bar, a_smem, pred=pred)


@gluon.jit
def fetch_tile(c, smem, ready, stage, rows, head, start, pred, C: gl.constexpr, TILE: gl.constexpr):
    """Start the copy of a block of c into its stage."""
    bar = ready.index(stage)
    mbarrier.expect(bar, C * TILE * 4, pred=pred)
    copy_in(c, [rows.batch, start, head, rows.column], bar, smem.index(stage), pred=pred)


@gluon.jit
def load_tile(block, tokens, LEFT: gl.constexpr, PACKED: gl.constexpr):
    """A block of c, transposed as it is given."""
    c = block.load(LEFT)
    if PACKED:
        c = gl.where((gl.arange(0, block.shape[1], gl.SliceLayout(0, LEFT)) < tokens)[None, :], c, 0.0)
    return c


@gluon.jit
def weigh(c, zero, at, tokens, nearest, rate, elapsed, weight_scale, THREE: gl.constexpr, REVERSE: gl.constexpr):
    """Parts of the columns of a block of c, by what is left of each row at the end of the block."""
    LEFT: gl.constexpr = c.type.layout
    C: gl.constexpr = c.shape[1]
    row = zero + gl.arange(0, C, gl.SliceLayout(0, LEFT))
    weight = row + 1 if REVERSE else gl.maximum(tokens - 1 - row, 0)
    weights = gl.exp2(rate * (weight - elapsed).to(gl.float32)) * weight_scale
    if nearest is not None:
        weights = gl.where(is_within(at + row, nearest, REVERSE), weights, 0.0)
    return left_parts(c * weights[None, :], LEFT, THREE)


@gluon.jit
def sweep(a, b, c, out, decay_grad, rows, begin, end, shape, rate, scale, TILES: gl.constexpr, PACKED: gl.constexpr,  # noqa: ARG001
          TRANSPOSED: gl.constexpr, REVERSE: gl.constexpr):  # fmt: skip
    """The loop, as ``roles.py`` calls it, but for ``decay_grad``: from ``first_state`` to the state at ``end``.

    With time reversed the state is that of the rows after. Where TILES.lazy it is carried as ``advance`` says.
    """
    C: gl.constexpr = TILES.C
    WIDTH: gl.constexpr = TILES.BE if TRANSPOSED else TILES.BD
    TILE: gl.constexpr = TILES.TD if TRANSPOSED else TILES.TE
    STAGES: gl.constexpr = TILES.stages
    THREE: gl.constexpr = TILES.precision == "bf16x6"
    PARTS: gl.constexpr = 3 if THREE else 2
    PRODUCTS: gl.constexpr = 6 if THREE else 3
    LAZY: gl.constexpr = TILES.lazy
    OUTPUT: gl.constexpr = out is not None
    BORDERS: gl.constexpr = rows.borders is not None
    WARPS: gl.constexpr = gl.num_warps()
    _, c_width = widths(shape, TRANSPOSED)
    b_head, c_head = heads_read(rows, TILES, TRANSPOSED)
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, C * 4 // WARPS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    left_out: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    left_state: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    parts_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, WIDTH], gl.bfloat16)

    b_smem = gl.allocate_shared_memory(gl.float32, [1, C, 1, WIDTH], b.layout)
    c_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, C, 1, TILE], c.layout)
    b_room = gl.allocate_shared_memory(gl.bfloat16, [PARTS, C, WIDTH], parts_layout)
    b_parts = b_room.index(0), b_room.index(1), b_room.index(PARTS - 1)
    a_smem = b_smem
    if OUTPUT:
        a_smem = gl.allocate_shared_memory(gl.float32, [1, C, 1, WIDTH], a.layout)
        a_room = gl.allocate_shared_memory(gl.bfloat16, [PARTS, C, WIDTH], parts_layout)
        a_parts = a_room.index(0), a_room.index(1), a_room.index(PARTS - 1)
        a_right = a_parts[0].permute((1, 0)), a_parts[1].permute((1, 0)), a_parts[2].permute((1, 0))
        p_parts = a_parts[0].slice(0, C, 1), a_parts[1].slice(0, C, 1), a_parts[2].slice(0, C, 1)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES + 1):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    barrier()
    if BORDERS:
        border_smem = gl.allocate_shared_memory(gl.int32, [2, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        line = gl.arange(0, C, gl.BlockedLayout([1], [32], [WARPS], [0]))

    stop = rows.stop
    blocks, first, step = order_of_blocks(rows, C, REVERSE)
    fetch(a, b, a_smem, b_smem, ready.index(STAGES), rows, b_head, first, blocks > 0, C, WIDTH, OUTPUT)
    for s in gl.static_range(STAGES - 1):
        fetch_tile(c, c_smem, ready, s, rows, c_head, first + s * step, s < blocks, C, TILE)

    col = rows.column + gl.arange(0, TILE, gl.SliceLayout(1, state_layout))
    b_col = gl.arange(0, WIDTH, gl.SliceLayout(0, state_layout))
    nothing = gl.zeros([TILE, WIDTH], gl.float32, state_layout)
    state = first_state(nothing, begin, b_col, col, shape, TRANSPOSED, TILES.columns_first)
    _, weight_scale = carried_units(rate, scale, False, REVERSE)
    elapsed = 0
    if OUTPUT:
        no_out = gl.zeros([TILE, C], gl.float32, out_layout)
        no_scores = gl.zeros([C, C], gl.float32, scores_layout)
    if BORDERS:
        borders_first, nearest = borders_of(rows, first, line, C, REVERSE)
        border_smem.index(0).store(borders_first)
        barrier()
    else:
        nearest = None
    if OUTPUT:
        mbarrier.wait(ready.index(STAGES), 0, pred=blocks > 0)
        split_block(a_smem, a_parts, C, C, WIDTH, False, THREE)
    stage = 0
    phase = 0
    for n in range(blocks):
        at = first + n * step
        tokens = gl.minimum(stop - at, C)
        if BORDERS:
            is_kept = is_past(nearest, at, at + tokens, REVERSE)
            following = gl.minimum(gl.maximum(at + step, rows.start), stop - 1)  # loaded a block ahead
            borders_ahead, nearest_ahead = borders_of(rows, following, line, C, REVERSE)
        if OUTPUT:
            tma.store_wait(0)
        else:
            mbarrier.wait(ready.index(STAGES), n & 1)
        split_block(b_smem, b_parts, tokens, C, WIDTH, PACKED, THREE)
        fence_async_shared()
        barrier()  # the parts are there; what they came from is free, and so is where the output before lay
        fetch(a, b, a_smem, b_smem, ready.index(STAGES), rows, b_head, at + step, n + 1 < blocks, C, WIDTH, OUTPUT)
        ahead = n + STAGES - 1
        last = stage - 1 + (stage == 0).to(gl.int32) * STAGES
        fetch_tile(c, c_smem, ready, last, rows, c_head, first + ahead * step, ahead < blocks, C, TILE)

        # Rows are counted anew in every block, from a 0 of which the compiler does not know that it is one: what is the
        # same in all of them it would keep in registers, which the loop does not have.
        zero = (tokens <= 0).to(gl.int32)
        if OUTPUT:
            j = gl.arange(0, C, gl.SliceLayout(1, scores_layout))[:, None]
            score_row = zero + gl.arange(0, C, gl.SliceLayout(0, scores_layout))[None, :]
            out_row = zero + gl.arange(0, C, gl.SliceLayout(0, out_layout))
            gap = (j - score_row) if REVERSE else (score_row - j)
            scores = multiply(b_parts, a_right, no_scores, THREE, False)
            o = multiply(left_parts(state, left_out, THREE), a_right, no_out, THREE, False)
            scores = warpgroup_mma_wait(PRODUCTS, deps=[scores])
            p = gl.where(gap >= 0, scores * (gl.exp2(rate * gl.maximum(gap, 0).to(gl.float32)) * scale), 0.0)
            if BORDERS:
                if not is_kept:  # the block has rows of several documents, or of one that begins or ends with it
                    border = border_smem.index(n % 2).load(gl.SliceLayout(0, scores_layout))
                    p = gl.where(is_within(at + j, border[None, :], REVERSE), p, 0.0)
            o = warpgroup_mma_wait(0, deps=[o])
            barrier()  # a's parts have been read
            store_parts(p, p_parts, THREE)
            fence_async_shared()
            barrier()
            if REVERSE:
                o = o * gl.exp2(rate * (gl.maximum(tokens - 1 - out_row, 0) + elapsed).to(gl.float32))[None, :]
            else:
                o = o * (gl.exp2(rate * (out_row + 1 + elapsed).to(gl.float32)) * scale)[None, :]
            if BORDERS:
                if not is_kept:
                    border = border_smem.index(n % 2).load(gl.SliceLayout(0, out_layout))
                    o = gl.where(is_past(border, at, at + tokens, REVERSE)[None, :], o, 0.0)
        if LAZY:
            elapsed, whole, rest = advance(rate, elapsed, tokens)
        else:
            whole, rest = whole_and_rest(rate * tokens * 0.6931471805599453)
        if BORDERS:
            if not is_kept:
                state = gl.zeros([TILE, WIDTH], gl.float32, state_layout)
        c_block = c_smem.index(stage).reshape([C, TILE]).permute((1, 0))
        mbarrier.wait(ready.index(stage), phase)
        if OUTPUT:
            left = left_parts(load_tile(c_block, tokens, left_out, PACKED), left_out, THREE)
            if THREE:
                within = multiply(left, p_parts, no_out, THREE, False)
                o += warpgroup_mma_wait(0, deps=[within])
            else:
                o = multiply(left, p_parts, o, THREE, True)
        tile = load_tile(c_block, tokens, left_state, PACKED)
        weighted = weigh(tile, zero, at, tokens, nearest, rate, elapsed, weight_scale, THREE, REVERSE)
        # One sum a block rounds a long state less often than one a row.
        if THREE:
            added = multiply(weighted, b_parts, nothing, THREE, False)
        else:
            added = multiply(weighted, b_parts, state + state * (rest + (whole - 1.0)), THREE, True)
        if OUTPUT:
            if not THREE:
                o = warpgroup_mma_wait(PRODUCTS, deps=[o])
            write_block(out, c_smem.index(stage), o, rows, at, tokens, c_width, C, TILE, PACKED)  # c has been read
            # While the state is made, so are a's next parts: nobody reads any more what is in their place.
            mbarrier.wait(ready.index(STAGES), (n + 1) & 1, pred=n + 1 < blocks)
            split_block(a_smem, a_parts, C, C, WIDTH, False, THREE)
        added = warpgroup_mma_wait(0, deps=[added])
        state = state * whole + (state * rest + added) if THREE else added
        if BORDERS:
            border_smem.index((n + 1) % 2).store(borders_ahead)
            nearest = nearest_ahead
        barrier()  # every warp is done with the parts
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if OUTPUT:
        tma.store_wait(0)
    barrier()
    for s in gl.static_range(STAGES + 1):
        mbarrier.invalidate(ready.index(s))  # another segment's may be made in the same place
    if end.final is not None:
        if end.is_stored:
            factor = gl.exp2(rate * elapsed)
            store_state(end.final + end.final_offset, state, state, factor, rows.column, shape, WIDTH, TILE,
                        TRANSPOSED, TILES.columns_first)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def forward_kernel(q, k, v, out, out_pointer, out_batch_stride: "i64", out_row_stride, log_decay, initial, final,
                   state_slot_stride: "i64", state_head_stride: "i64", slots, fresh, boundary_states, segment_table,
                   segments_per_sequence, segment_rows, begins, ends, segment_count, T, H, D, E, scale,
                   TILES: gl.constexpr, PERSISTENT: gl.constexpr):  # fmt: skip
    roles.forward(sweep, q, k, v, Output(out, out_pointer, out_batch_stride, out_row_stride), log_decay,
                  Pool(initial, final, state_slot_stride, state_head_stride, slots, fresh), boundary_states,
                  Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends), Shape(T, H, D, E),
                  scale, segment_count, TILES, PERSISTENT)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def backward_kernel(q, k, v, dout, q_tile, k_tile, dout_tile, dq, dq_pointer, dq_batch_stride: "i64", dq_row_stride, dk,
                    dk_pointer, dk_batch_stride: "i64", dk_row_stride, dv, dv_pointer, dv_batch_stride: "i64",
                    dv_row_stride, log_decay, initial, dfinal, dinitial, states_before, grads_after, decay_sums,
                    segment_table, segments_per_sequence, segment_rows, begins, ends, T, H, D, E, scale,
                    TILES: gl.constexpr):  # fmt: skip
    roles.backward(sweep, Operands(q, k, v, dout), Operands(q_tile, k_tile, None, dout_tile),
                   Output(dq, dq_pointer, dq_batch_stride, dq_row_stride),
                   Output(dk, dk_pointer, dk_batch_stride, dk_row_stride),
                   Output(dv, dv_pointer, dv_batch_stride, dv_row_stride), log_decay, initial, dfinal, dinitial,
                   states_before, grads_after, decay_sums,
                   Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends), Shape(T, H, D, E),
                   scale, TILES)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def states_kernel(k, v, q, dout, log_decay, local_before, local_after, final, segment_table, segments_per_sequence,
                  segment_rows, begins, ends, piece_rows, last_piece_rows, piece_count, T, H, D, E, scale,
                  TILES: gl.constexpr, PERSISTENT: gl.constexpr):  # fmt: skip
    roles.states(sweep, k, v, q, dout, log_decay, local_before, local_after, final,
                 Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends), piece_rows,
                 last_piece_rows, Shape(T, H, D, E), scale, piece_count, TILES, PERSISTENT)  # fmt: skip


@dispatch.unspecialized(gluon.jit)
def snapshot_kernel(k, v, log_decay, pool, state_slot_stride: "i64", state_head_stride: "i64", slots, fresh,
                    boundary_states, cu_seqlens, first_boundary, snapshot_at, snapshot_slots, per_sequence,
                    segment_rows, T, H, D, E, TILES: gl.constexpr):  # fmt: skip
    roles.snapshot(sweep, k, v, log_decay, Pool(pool, pool, state_slot_stride, state_head_stride, slots, fresh),
                   boundary_states, cu_seqlens, first_boundary, snapshot_at, snapshot_slots, per_sequence, segment_rows,
                   Shape(T, H, D, E), TILES)  # fmt: skip


SWEEP = Sweep(
    forward_kernel, backward_kernel, states_kernel, snapshot_kernel, read_tile, read_tile, read_tile, write,
    dispatch.run,
)  # fmt: skip
