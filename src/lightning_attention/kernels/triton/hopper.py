"""The sweep for Hopper, in Gluon: what ``sweep.py`` computes, with the copies and products placed by hand.

A program has four warps and keeps one [BE, BD] part of the transposed state in registers. The tensor copy engine fills
two stages of shared memory; the state and the weighted columns of c are left operands from registers, so only the
scores (8 KB) and the outputs (8 KB) are written to shared memory. 96 KB and at most 255 registers a thread: two
programs fit on a multiprocessor, and one computes while the other waits. On an H200 at B 4, T 32768, H 32, D 128 that
is 0.93 of the floor forward, where three stages and so one program reach 0.83, and the same loop left to Triton's own
pipelining 0.75.
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

from lightning_attention.kernels.triton.part import (
    carried_units,
    inherits,
    is_alone,
    log2_decay,
    of_state,
    piece_from_end,
    piece_from_start,
    power_below,
    segment_or_piece,
    snapshot,
    what_is_lost,
)

# Their names until Triton 3.6, where the new ones do not exist.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def fetch(a_desc, b_desc, c_desc, a_smem, b_smem, c_smem, ready, stage, sequence, start, head, column, pred,
          C: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, OUTPUT: gl.constexpr):  # fmt: skip
    """Start the copies of a block into its stage."""
    bar = ready.index(stage)
    mbarrier.expect(bar, C * ((BD if OUTPUT else 0) + BD + BE) * 2, pred=pred)
    copy_in(b_desc, [sequence, start, head, 0], bar, b_smem.index(stage), pred=pred)
    if OUTPUT:
        copy_in(a_desc, [sequence, start, head, 0], bar, a_smem.index(stage), pred=pred)
    copy_in(c_desc, [sequence, start, head, column], bar, c_smem.index(stage), pred=pred)


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
def state_pointers(base, BE: gl.constexpr, BD: gl.constexpr, layout: gl.constexpr, column, b_width, c_width, b_stride,
                   c_stride):  # fmt: skip
    """Where a program's part of a state [D, E] lies, transposed, and which of it exists."""
    c = column + gl.arange(0, BE, gl.SliceLayout(1, layout))
    b = gl.arange(0, BD, gl.SliceLayout(0, layout))
    return base + c[:, None] * c_stride + b[None, :] * b_stride, (c < c_width)[:, None] & (b < b_width)[None, :]


@gluon.jit
def first_state(initial, inherits, between, alone, column, b_width, c_width, b_stride, c_stride,
                BE: gl.constexpr, BD: gl.constexpr, layout: gl.constexpr, INITIAL: gl.constexpr,
                SEGMENTED: gl.constexpr):  # fmt: skip
    """What a program starts from.

    The sequence's state where the segment is ``alone`` in it and it ``inherits`` one, what the scan left ``between``
    its segments, or zero.
    """
    state = gl.zeros([BE, BD], gl.float32, layout)
    if SEGMENTED:
        left, exists = state_pointers(between, BE, BD, layout, column, b_width, c_width, b_stride, c_stride)
        if INITIAL:
            if not alone:
                state = gl.load(left, mask=exists, other=0.0)
        else:  # a mask, where a branch takes registers that Hopper's loop does not have
            state = gl.load(left, mask=exists & (not alone), other=0.0)
    if INITIAL:
        if inherits:
            where, exists = state_pointers(initial, BE, BD, layout, column, b_width, c_width, b_stride, c_stride)
            state = gl.load(where, mask=exists, other=0.0).to(gl.float32)
    return state


@gluon.jit
def sweep(a_desc, b_desc, c_desc, o_desc, o, o_row, initial, inherits, between, alone, final, keep, b_stride,
          c_stride,
          batch, head, start, stop, column, b_width, c_width, rate, scale, C: gl.constexpr, BD: gl.constexpr,
          BE: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr, INITIAL: gl.constexpr,
          SEGMENTED: gl.constexpr, FINAL: gl.constexpr, OUTPUT: gl.constexpr, REVERSE: gl.constexpr):  # fmt: skip
    """Rows start … stop of one head, from its ``first_state`` to the state at ``final``, stored if ``keep``.

    With time reversed the state is that of the rows after. ``o`` is for the last block of a packed sequence alone,
    which a copy of C rows would overrun.
    """
    dtype: gl.constexpr = b_desc.dtype
    HALF: gl.constexpr = b_desc.dtype == gl.float16
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    left_scores: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    left_state: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)

    b_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, BD], b_desc.layout)
    c_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, BE], c_desc.layout)
    a_smem = b_smem
    if OUTPUT:
        a_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, BD], a_desc.layout)
        p_smem = gl.allocate_shared_memory(dtype, [C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype))
        o_smem = gl.allocate_shared_memory(dtype, [1, C, 1, BE], o_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    barrier()

    blocks = (stop - start + C - 1) // C
    first = start
    step = C
    if REVERSE:
        first = start + (blocks - 1) * C
        step = -C
    for s in gl.static_range(STAGES - 1):
        fetch(a_desc, b_desc, c_desc, a_smem, b_smem, c_smem, ready, s, batch, first + s * step, head, column,
              s < blocks, C, BD, BE, OUTPUT)  # fmt: skip

    state = first_state(initial, inherits, between, alone, column, b_width, c_width, b_stride, c_stride, BE, BD,
                        state_layout, INITIAL, SEGMENTED)  # fmt: skip
    unit, weight_scale = carried_units(rate, scale, HALF, REVERSE)
    if HALF and REVERSE:
        state *= gl.exp2(-unit)
    c_row = gl.arange(0, C, gl.SliceLayout(0, left_state))
    if OUTPUT:
        j = gl.arange(0, C, gl.SliceLayout(1, scores_layout))[:, None]
        i = gl.arange(0, C, gl.SliceLayout(0, scores_layout))[None, :]
        gap = (j - i) if REVERSE else (i - j)
        mask = gl.where(gap >= 0, gl.exp2(rate * gl.maximum(gap, 0).to(gl.float32)) * scale, 0.0)
        out_row = gl.arange(0, C, gl.SliceLayout(0, scores_layout))
        nothing = gl.zeros([BE, C], gl.float32, scores_layout)
        no_scores = gl.zeros([C, C], gl.float32, scores_layout)

    lost_in_whole = what_is_lost(rate, C)
    stage = 0
    phase = 0
    for n in range(blocks):
        at = first + n * step
        tokens = gl.minimum(stop - at, C)
        b = b_smem.index(stage).reshape([C, BD])
        c = c_smem.index(stage).reshape([C, BE])
        mbarrier.wait(ready.index(stage), phase)
        if PACKED:
            if tokens < C:
                clear_tail(b, tokens, C, BD)
                clear_tail(c, tokens, C, BE)
                fence_async_shared()
                barrier()
        if OUTPUT:
            a = a_smem.index(stage).reshape([C, BD]).permute((1, 0))
            scores = warpgroup_mma(b, a, no_scores, use_acc=False, is_async=True)

        # The stage before this one is free: what read it last was the product that made ``state``.
        ahead = n + STAGES - 1
        last = stage - 1 + (stage == 0).to(gl.int32) * STAGES
        fetch(a_desc, b_desc, c_desc, a_smem, b_smem, c_smem, ready, last, batch, first + ahead * step, head, column,
              ahead < blocks, C, BD, BE, OUTPUT)  # fmt: skip
        if OUTPUT:
            if HALF:  # rows of the state, each times a power of two that makes it fit
                power, inverse = power_below(gl.max(gl.abs(state), 1))
                left = gl.convert_layout((state * inverse[:, None]).to(dtype), left_scores)
            else:
                left = gl.convert_layout(state.to(dtype), left_scores)
            out = warpgroup_mma(left, a, nothing, use_acc=False, is_async=True)

        # λ^(m−1−r), or λ^(r+1) as λ^m over it: the same in every block, that would be kept in registers, 16 a thread,
        # which Triton 3.6 and 3.8 then spill. The exponent of a row past the end is clamped; that row of c is zero.
        across = rate * tokens.to(gl.float32)
        to_end = rate * gl.maximum(tokens - 1 - c_row, 0).to(gl.float32)
        weight = gl.exp2(across - to_end if REVERSE else to_end) * weight_scale
        weighted = (c.permute((1, 0)).load(left_state).to(gl.float32) * weight[None, :]).to(dtype)

        if OUTPUT:
            scores = warpgroup_mma_wait(1, deps=[scores])
            p_smem.store((scores * mask).to(dtype))
            fence_async_shared()
            barrier()
            out = warpgroup_mma_wait(0, deps=[out])
            if HALF:
                out = out * gl.convert_layout(power, gl.SliceLayout(1, scores_layout))[:, None]
            to_end = rate * gl.maximum(tokens - 1 - out_row, 0).to(gl.float32)
            if REVERSE:
                out = out * gl.exp2(to_end + unit)[None, :]
            else:
                out = out * (gl.exp2(across - to_end) * scale)[None, :]
            out = warpgroup_mma(c.permute((1, 0)), p_smem, out, is_async=True)
        # One product and sum a number; that it rounds a decay near 0 does not matter in 16 bits.
        lost = lost_in_whole
        if tokens < C:
            lost = what_is_lost(rate, tokens)
        state = warpgroup_mma(weighted, b, state + state * lost, is_async=True)
        if OUTPUT:
            out = warpgroup_mma_wait(1, deps=[out])
            tma.store_wait(0)
            barrier()
            o_smem.reshape([C, BE]).permute((1, 0)).store(out.to(dtype))
            fence_async_shared()
            barrier()
            if PACKED and tokens < C:
                store_tail(o + at.to(gl.int64) * o_row + column, o_smem.reshape([C, BE]), o_row, tokens,
                           c_width - column, C, BE)  # fmt: skip
            else:
                copy_out(o_desc, [batch, at, head, column], o_smem)
        state = warpgroup_mma_wait(0, deps=[state])
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
    if FINAL:
        if keep:
            where, exists = state_pointers(final, BE, BD, state_layout, column, b_width, c_width, b_stride, c_stride)
            state *= gl.exp2(unit)
            gl.store(where, state.to(final.dtype.element_ty), mask=exists)


# Nothing but alignment is specialized, which a call by ``launcher.run`` relies on: a kernel compiled for one set of
# numbers serves every other.
NUMBERS = ["log_decay", "table", "segments", "L", "M", "T", "H", "D", "E", "scale"]
STATES = [
    "initial", "final", "state_slot", "state_head", "slots", "fresh", "between", "dfinal",
    "dinitial", "before", "after",
]  # fmt: skip


@gluon.jit
def forward_segment(q_desc, k_desc, v_desc, o_desc, o, o_batch, o_row, log_decay, initial, final, state_slot,
                    state_head, slots, fresh, between, table, place, head, column, segments, L, M, T, H, D, E, scale,
                    C: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
                    SEGMENTED: gl.constexpr, INITIAL: gl.constexpr, FINAL: gl.constexpr,
                    OUTPUT: gl.constexpr):  # fmt: skip
    """The part of one head and some columns in one segment or, without OUTPUT, in one of its pieces."""
    sequence, batch, start, stop, is_first, is_last, slot, index, pieces = segment_or_piece(
        table, place, segments, L, M, T, PACKED, OUTPUT)  # fmt: skip
    if sequence >= 0:
        rate = log2_decay(log_decay, head)
        of_segment = between + ((slot.to(gl.int64) * pieces + index) * H + head) * D * E
        of_sequence = of_state(slots, sequence, state_slot) + head * state_head
        if OUTPUT:
            alone = is_alone(is_first, is_last, SEGMENTED, PACKED)
            sweep(q_desc, k_desc, v_desc, o_desc, o + batch * o_batch + head * E, o_row, initial + of_sequence,
                  alone & inherits(fresh, sequence), of_segment, alone, final + of_sequence, is_last, E, 1, batch, head,
                  start, stop, column, D, E, rate, scale, C, BD, BE, STAGES, PACKED, INITIAL, SEGMENTED, FINAL, True,
                  False)  # fmt: skip
        else:
            start, stop = piece_from_end(start, stop, index, rate, L, M, PACKED)
            if (not is_last) & (start < stop):
                sweep(q_desc, k_desc, v_desc, o_desc, o, o_row, initial, False, between, True, of_segment, True, E, 1,
                      batch, head, start, stop, column, D, E, rate, scale, C, BD, BE, STAGES, PACKED, False, False,
                      True, False, False)  # fmt: skip


@gluon.jit(do_not_specialize=[*NUMBERS, *STATES, "o_batch", "places"])
def forward_kernel(q_desc, k_desc, v_desc, o_desc, o, o_batch: "i64", o_row, log_decay, initial, final,
                   state_slot: "i64", state_head: "i64", slots, fresh, between, table, places, segments, L, M, T, H, D,
                   E, scale, C: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, STAGES: gl.constexpr,
                   PACKED: gl.constexpr, SEGMENTED: gl.constexpr, INITIAL: gl.constexpr, FINAL: gl.constexpr,
                   OUTPUT: gl.constexpr):  # fmt: skip
    """o = sweep(q, k, v); without OUTPUT the state that each piece of M rows of a segment would leave by itself.

    ``initial`` and ``final`` are states of sequences, sequence i's at ``slots[i]`` where there are slots; ``between``
    are the states before segments. A program has one segment, or, of ``places`` in the table, as many as it takes.
    """
    tiles = gl.cdiv(E, BE)
    pid = gl.program_id(0)
    column = pid % tiles * BE
    head = pid // tiles % H
    first = pid // tiles // H
    if places is None:
        forward_segment(q_desc, k_desc, v_desc, o_desc, o, o_batch, o_row, log_decay, initial, final, state_slot,
                        state_head, slots, fresh, between, table, first, head, column, segments, L, M, T, H, D, E,
                        scale, C, BD, BE, STAGES, PACKED, SEGMENTED, INITIAL, FINAL, OUTPUT)  # fmt: skip
    else:
        if not OUTPUT:
            places = T // L * gl.cdiv(L, M)
        for place in range(first, places, gl.num_programs(0) // tiles // H):
            forward_segment(q_desc, k_desc, v_desc, o_desc, o, o_batch, o_row, log_decay, initial, final, state_slot,
                            state_head, slots, fresh, between, table, place, head, column, segments, L, M, T, H, D, E,
                            scale, C, BD, BE, STAGES, PACKED, SEGMENTED, INITIAL, FINAL, OUTPUT)  # fmt: skip


@gluon.jit(do_not_specialize=[*NUMBERS, *STATES, "d_batch", "e_batch"])
def backward_kernel(q_desc, k_desc, v_desc, g_desc, q_tile, k_tile, g_tile, dq_desc, dk_desc, dv_desc, dq, dk, dv,
                    d_batch: "i64", d_row, e_batch: "i64", e_row, log_decay, initial, dfinal, dinitial, before, after,
                    table, segments, L, M, T, H, D, E, scale, C: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr,
                    TD: gl.constexpr, TE: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
                    SEGMENTED: gl.constexpr, INITIAL: gl.constexpr, DFINAL: gl.constexpr, DINITIAL: gl.constexpr,
                    OUTPUT: gl.constexpr):  # fmt: skip
    """dv = reverse sweep(k, q, do); dk = reverse sweep(v, do, q); dq = sweep(do, v, k), one role a program.

    ``initial``, ``dfinal`` and ``dinitial`` are states of sequences and their gradients; ``before`` holds the states
    before and ``after`` the gradients of the states after each segment. The roles of a segment are neighbours, so that
    what one reads the others find in L2. Without OUTPUT: the states and gradients that each piece of M rows of a
    segment would leave by itself.
    """
    e_tiles = gl.cdiv(E, TE)
    d_tiles = gl.cdiv(D, TD)
    roles = e_tiles + d_tiles + (d_tiles if OUTPUT else 0)
    pid = gl.program_id(0)
    role = pid % roles
    head = pid // roles % H
    place = pid // roles // H
    sequence, batch, start, stop, is_first, is_last, slot, index, pieces = segment_or_piece(
        table, place, segments, L, M, T, PACKED, OUTPUT)  # fmt: skip
    if sequence < 0:
        return
    rate = log2_decay(log_decay, head)
    of_sequence = (sequence.to(gl.int64) * H + head) * D * E
    of_segment = ((slot.to(gl.int64) * pieces + index) * H + head) * D * E
    before += of_segment
    after += of_segment
    alone = is_alone(is_first, is_last, SEGMENTED, PACKED)
    if OUTPUT:
        if role < e_tiles:
            sweep(k_desc, q_desc, g_tile, dv_desc, dv + batch * e_batch + head * E, e_row, dfinal + of_sequence, alone,
                  after, alone, dinitial + of_sequence, is_first, E, 1, batch, head, start, stop, role * TE, D, E,
                  rate, scale, C, BD, TE, STAGES, PACKED, DFINAL, SEGMENTED, DINITIAL, True, True)  # fmt: skip
        elif role < e_tiles + d_tiles:
            column = (role - e_tiles) * TD
            sweep(g_desc, v_desc, k_tile, dq_desc, dq + batch * d_batch + head * D, d_row, initial + of_sequence, alone,
                  before, alone, before, False, 1, E, batch, head, start, stop, column, E, D, rate, scale, C,
                  BE, TD, STAGES, PACKED, INITIAL, SEGMENTED, False, True, False)  # fmt: skip
        else:
            column = (role - e_tiles - d_tiles) * TD
            sweep(v_desc, g_desc, q_tile, dk_desc, dk + batch * d_batch + head * D, d_row, dfinal + of_sequence, alone,
                  after, alone, after, False, 1, E, batch, head, start, stop, column, E, D, rate, scale, C, BE,
                  TD, STAGES, PACKED, DFINAL, SEGMENTED, False, True, True)  # fmt: skip
    elif role < e_tiles:
        start, stop = piece_from_start(start, stop, index, rate, L, M, PACKED)
        if is_first | (start >= stop):
            return
        sweep(k_desc, q_desc, g_tile, dv_desc, dv, e_row, dfinal, False, after, True, after, True, E, 1, batch,
              head, start, stop, role * TE, D, E, rate, scale, C, BD, TE, STAGES, PACKED, False, False, True, False,
              True)  # fmt: skip
    else:
        start, stop = piece_from_end(start, stop, index, rate, L, M, PACKED)
        if is_last | (start >= stop):
            return
        sweep(g_desc, v_desc, k_tile, dq_desc, dq, d_row, initial, False, before, True, before, True, 1, E,
              batch, head, start, stop, (role - e_tiles) * TD, E, D, rate, scale, C, BE, TD, STAGES, PACKED, False,
              False, True, False, False)  # fmt: skip


@gluon.jit(do_not_specialize=[*NUMBERS, *STATES, "state", "cu_seqlens", "first", "at", "to", "P"])
def snapshot_kernel(k_desc, v_desc, log_decay, state, state_slot: "i64", state_head: "i64", slots, fresh, between,
                    cu_seqlens, first, at, to, P, L, H, D, E, C: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr,
                    STAGES: gl.constexpr):  # fmt: skip
    """Write the state after ``at`` [N, P] rows of each packed sequence to the row ``to`` [N, P] of the pool ``state``.

    From the state before the segment that the snapshot is in, over its rows up to there.
    """
    tiles = gl.cdiv(E, BE)
    pid = gl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % H
    item = pid // tiles // H
    sequence = item // P
    start, rows, segment_, wanted = snapshot(cu_seqlens, slots, at, to, item, sequence, L)
    if not wanted:
        return
    alone = segment_ == 0
    between += ((gl.load(first + sequence) + segment_).to(gl.int64) * H + head) * D * E
    stop = start + rows
    start += segment_ * L
    target = of_state(to, item, state_slot) + head * state_head
    sweep(k_desc, k_desc, v_desc, v_desc, state, 0, state + of_state(slots, sequence, state_slot) + head * state_head,
          alone & inherits(fresh, sequence), between, alone, state + target, True, E, 1, 0, head,
          start, stop, tile * BE, D, E, log2_decay(log_decay, head), 1.0, C, BD, BE, STAGES, True, True, True,
          True, False, False)  # fmt: skip
