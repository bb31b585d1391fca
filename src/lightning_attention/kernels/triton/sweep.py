"""The one loop that everything is made of: a sweep over the blocks of a sequence with the state in registers.

    sweep(a, b, c):   o_t = scale · Σ_{s ≤ t} λ^(t−s) (a_t · b_s) c_s        (and with time reversed, s ≥ t)

    o = sweep(q, k, v);   dq = sweep(do, v, k);   dk = reverse sweep(v, do, q);   dv = reverse sweep(k, q, do)

A program owns one head of one sequence (or one segment of it) and BE columns of c, and keeps its part of the state
Σ λ^… cᵀ b, [BE, BD] in float32. It is kept transposed, c's columns first: so both products that read what a product
just made, (state)(aᵀ) and the update, take it as the left operand, which matrix units read from registers. Only the
C×C scores pass through shared memory (8 KB a block in 16 bits, where the state would be 16 to 32 KB).

This is the portable form, for any device that Triton compiles for and any strides; ``hopper.py`` is the same loop with
Hopper's copy engine and asynchronous products.
"""

import triton
import triton.language as tl

from lightning_attention.kernels.triton.part import (
    advance,
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
    whole_and_rest,
)


@triton.jit
def load_rows(x, row_stride, start, stop, column, width, C: tl.constexpr, BW: tl.constexpr, EVEN: tl.constexpr):
    """Rows start … start+C and columns column … column+BW of [T, width]; zero past either end, and not read there."""
    row = start + tl.arange(0, C)
    col = column + tl.arange(0, BW)
    inside = (row < stop)[:, None]
    if not EVEN:
        inside = inside & (col < width)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * row_stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def state_pointers(base, column, b_width, c_width, b_stride, c_stride, BD: tl.constexpr, BE: tl.constexpr):
    """Where a program's part of a state [D, E] lies, transposed, and which of it exists."""
    c = column + tl.arange(0, BE)
    b = tl.arange(0, BD)
    return base + c[:, None] * c_stride + b[None, :] * b_stride, (c < c_width)[:, None] & (b < b_width)[None, :]


@triton.jit
def first_state(initial, inherits, between, alone, column, b_width, c_width, b_stride, c_stride,
                BD: tl.constexpr, BE: tl.constexpr, INITIAL: tl.constexpr, SEGMENTED: tl.constexpr):  # fmt: skip
    """What a program starts from.

    The sequence's state where the segment is ``alone`` in it and it ``inherits`` one, what the scan left ``between``
    its segments, or zero.
    """
    state = tl.zeros([BE, BD], tl.float32)
    if SEGMENTED:
        left, exists = state_pointers(between, column, b_width, c_width, b_stride, c_stride, BD, BE)
        if INITIAL:
            if not alone:
                state = tl.load(left, mask=exists, other=0.0)
        else:  # a mask, where a branch takes registers that Hopper's loop does not have
            state = tl.load(left, mask=exists & (not alone), other=0.0)
    if INITIAL:
        if inherits:
            where, exists = state_pointers(initial, column, b_width, c_width, b_stride, c_stride, BD, BE)
            state = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    return state


@triton.jit
def sweep(a, b, c, o, a_row, b_row, c_row, o_row, initial, inherits, between, alone, final, keep, b_stride, c_stride,
          start, stop, column, b_width, c_width, rate, scale, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
          EVEN_B: tl.constexpr, EVEN_C: tl.constexpr, INITIAL: tl.constexpr, SEGMENTED: tl.constexpr,
          FINAL: tl.constexpr, OUTPUT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, LAZY: tl.constexpr,
          STAGES: tl.constexpr):  # fmt: skip
    """Rows start … stop of one head, from its ``first_state`` to the state at ``final``, stored if ``keep``.

    With time reversed the state is that of the rows after. LAZY: carried as ``advance`` says.
    """
    HALF: tl.constexpr = b.dtype.element_ty == tl.float16
    state = first_state(initial, inherits, between, alone, column, b_width, c_width, b_stride, c_stride, BD, BE,
                        INITIAL, SEGMENTED)  # fmt: skip
    unit, weight_scale = carried_units(rate, scale, HALF, REVERSE)
    if HALF and REVERSE:
        state *= tl.exp2(-unit)
    elapsed = 0
    row = tl.arange(0, C)
    gap = row[None, :] - row[:, None]
    if REVERSE:
        gap = -gap
    mask = tl.where(gap >= 0, tl.exp2(rate * tl.maximum(gap, 0)) * scale, 0.0)
    blocks = tl.cdiv(stop - start, C)
    for n in tl.range(0, blocks, num_stages=STAGES):
        at = start + n * C
        if REVERSE:
            at = start + (blocks - 1 - n) * C
        tokens = tl.minimum(stop - at, C)
        bt = load_rows(b, b_row, at, stop, 0, b_width, C, BD, EVEN_B)
        ct = tl.trans(load_rows(c, c_row, at, stop, column, c_width, C, BE, EVEN_C))
        # Rows from the start of the block, 1..m, and to its end, m−1..0; a row past the end is clamped, and zero in c.
        from_start = row + 1
        to_end = tl.maximum(tokens - 1 - row, 0)
        if OUTPUT:
            at_ = tl.trans(load_rows(a, a_row, at, stop, 0, b_width, C, BD, EVEN_B))
            scores = tl.dot(bt, at_, input_precision=PRECISION) * mask
            if HALF:  # rows of the state, each times a power of two that makes it fit
                power, inverse = power_below(tl.max(tl.abs(state), 1))
                out = tl.dot((state * inverse[:, None]).to(bt.dtype), at_) * power[:, None]
            else:
                out = tl.dot(state.to(bt.dtype), at_, input_precision=PRECISION)
            if REVERSE:
                out = out * tl.exp2(rate * (to_end + elapsed) + unit)[None, :]
            else:
                out = out * (tl.exp2(rate * (from_start + elapsed) + unit) * scale)[None, :]
            out = tl.dot(ct, scores.to(ct.dtype), out, input_precision=PRECISION)
            col = column + tl.arange(0, BE)
            rows = o + (at + row).to(tl.int64)[:, None] * o_row + col[None, :]
            inside = (row < tokens)[:, None]
            if not EVEN_C:
                inside = inside & (col < c_width)[None, :]
            tl.store(rows, tl.trans(out.to(bt.dtype)), mask=inside)
        if LAZY:
            elapsed, whole, rest = advance(rate, elapsed, tokens)
        else:
            whole, rest = whole_and_rest(rate * tokens * 0.6931471805599453)
        weight = to_end
        if REVERSE:
            weight = from_start
        weighted = (ct.to(tl.float32) * (tl.exp2(rate * (weight - elapsed)) * weight_scale)[None, :]).to(ct.dtype)
        if PRECISION == "ieee":  # one sum a block rounds a long state less often than one a row
            state = state * whole + (state * rest + tl.dot(weighted, bt, input_precision=PRECISION))
        else:
            state = tl.dot(weighted, bt, state * whole + state * rest, input_precision=PRECISION)
    if FINAL:
        if keep:
            where, exists = state_pointers(final, column, b_width, c_width, b_stride, c_stride, BD, BE)
            state *= tl.exp2(rate * elapsed + unit)
            tl.store(where, state.to(final.dtype.element_ty), mask=exists)


@triton.jit
def forward_segment(q, k, v, o, q_batch, q_row, k_batch, k_row, v_batch, v_row, o_batch, log_decay, initial, final,
                    state_slot, state_head, slots, fresh, between, table, place, head, column, segments, L, M, T, H, D,
                    E, scale, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, EVEN_D: tl.constexpr,
                    EVEN_E: tl.constexpr, PACKED: tl.constexpr, SEGMENTED: tl.constexpr, INITIAL: tl.constexpr,
                    FINAL: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr, LAZY: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """The part of one head and some columns in one segment or, without OUTPUT, in one of its pieces."""
    sequence, batch, start, stop, is_first, is_last, slot, index, pieces = segment_or_piece(
        table, place, segments, L, M, T, PACKED, OUTPUT)  # fmt: skip
    if sequence >= 0:
        rate = log2_decay(log_decay, head)
        of_segment = between + ((slot.to(tl.int64) * pieces + index) * H + head) * D * E
        of_sequence = of_state(slots, sequence, state_slot) + head * state_head
        q += batch * q_batch
        k += batch * k_batch
        v += batch * v_batch
        o += batch * o_batch
        if OUTPUT:
            alone = is_alone(is_first, is_last, SEGMENTED, PACKED)
            sweep(q, k, v, o, q_row, k_row, v_row, H * E, initial + of_sequence, alone & inherits(fresh, sequence),
                  of_segment, alone, final + of_sequence, is_last, E, 1, start, stop, column, D, E, rate, scale, C, BD,
                  BE, EVEN_D, EVEN_E, INITIAL, SEGMENTED, FINAL, True, False, PRECISION, LAZY, STAGES)  # fmt: skip
        else:
            start, stop = piece_from_end(start, stop, index, rate, L, M, PACKED)
            if (not is_last) & (start < stop):
                sweep(q, k, v, o, q_row, k_row, v_row, H * E, initial, False, between, True, of_segment, True, E, 1,
                      start, stop, column, D, E, rate, scale, C, BD, BE, EVEN_D, EVEN_E, False, False, True, False,
                      False, PRECISION, LAZY, STAGES)  # fmt: skip


@triton.jit(do_not_specialize=["segments", "L", "M", "T", "state_slot", "state_head", "places"])
def forward_kernel(q, k, v, o, q_batch: "i64", q_row, q_head: "i64", k_batch: "i64", k_row, k_head: "i64",
                   v_batch: "i64", v_row, v_head: "i64", o_batch: "i64", log_decay, initial, final, state_slot: "i64",
                   state_head: "i64", slots, fresh, between, table, places, segments, L, M, T, H, D, E, scale,
                   C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
                   PACKED: tl.constexpr, SEGMENTED: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
                   OUTPUT: tl.constexpr, PRECISION: tl.constexpr, LAZY: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """o = sweep(q, k, v); without OUTPUT the state that each piece of M rows of a segment would leave by itself.

    ``initial`` and ``final`` are states of sequences, sequence i's at ``slots[i]`` where there are slots; ``between``
    are the states before segments. A program has one segment, or, of ``places`` in the table, as many as it takes.
    """
    tiles = tl.cdiv(E, BE)
    pid = tl.program_id(0)
    column = pid % tiles * BE
    head = pid // tiles % H
    first = pid // tiles // H
    q += head * q_head
    k += head * k_head
    v += head * v_head
    o += head * E
    if places is None:
        forward_segment(q, k, v, o, q_batch, q_row, k_batch, k_row, v_batch, v_row, o_batch, log_decay, initial, final,
                        state_slot, state_head, slots, fresh, between, table, first, head, column, segments, L, M, T, H,
                        D, E, scale, C, BD, BE, EVEN_D, EVEN_E, PACKED, SEGMENTED, INITIAL, FINAL, OUTPUT, PRECISION,
                        LAZY, STAGES)  # fmt: skip
    else:
        if not OUTPUT:
            places = T // L * tl.cdiv(L, M)
        for place in range(first, places, tl.num_programs(0) // tiles // H):
            forward_segment(q, k, v, o, q_batch, q_row, k_batch, k_row, v_batch, v_row, o_batch, log_decay, initial,
                            final, state_slot, state_head, slots, fresh, between, table, place, head, column, segments,
                            L, M, T, H, D, E, scale, C, BD, BE, EVEN_D, EVEN_E, PACKED, SEGMENTED, INITIAL, FINAL,
                            OUTPUT, PRECISION, LAZY, STAGES)  # fmt: skip


@triton.jit(do_not_specialize=["segments", "L", "M", "T"])
def backward_kernel(q, k, v, g, dq, dk, dv, q_batch: "i64", q_row, q_head: "i64", k_batch: "i64", k_row,
                    k_head: "i64", v_batch: "i64", v_row, v_head: "i64", g_batch: "i64", g_row, g_head: "i64",
                    d_batch: "i64", e_batch: "i64", log_decay, initial, dfinal, dinitial, before, after, table,
                    segments, L, M, T, H, D, E, scale, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
                    TD: tl.constexpr, TE: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
                    EVEN_TD: tl.constexpr, EVEN_TE: tl.constexpr, PACKED: tl.constexpr, SEGMENTED: tl.constexpr,
                    INITIAL: tl.constexpr, DFINAL: tl.constexpr, DINITIAL: tl.constexpr, OUTPUT: tl.constexpr,
                    PRECISION: tl.constexpr, LAZY: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dv = reverse sweep(k, q, do); dk = reverse sweep(v, do, q); dq = sweep(do, v, k), one role a program.

    ``initial``, ``dfinal`` and ``dinitial`` are states of sequences and their gradients; ``before`` holds the states
    before and ``after`` the gradients of the states after each segment. The roles of a segment are neighbours, so that
    what one reads the others find in L2. Without OUTPUT: the states and gradients that each piece of M rows of a
    segment would leave by itself.
    """
    e_tiles = tl.cdiv(E, TE)
    d_tiles = tl.cdiv(D, TD)
    roles = e_tiles + d_tiles
    if OUTPUT:
        roles += d_tiles
    pid = tl.program_id(0)
    role = pid % roles
    head = pid // roles % H
    place = pid // roles // H
    sequence, batch, start, stop, is_first, is_last, slot, index, pieces = segment_or_piece(
        table, place, segments, L, M, T, PACKED, OUTPUT)  # fmt: skip
    if sequence < 0:
        return
    rate = log2_decay(log_decay, head)
    of_sequence = (sequence.to(tl.int64) * H + head) * D * E
    of_segment = ((slot.to(tl.int64) * pieces + index) * H + head) * D * E
    before += of_segment
    after += of_segment
    alone = is_alone(is_first, is_last, SEGMENTED, PACKED)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    g += batch * g_batch + head * g_head
    if OUTPUT:
        if role < e_tiles:
            sweep(k, q, g, dv + batch * e_batch + head * E, k_row, q_row, g_row, H * E, dfinal + of_sequence, alone,
                  after, alone, dinitial + of_sequence, is_first, E, 1, start, stop, role * TE, D, E, rate,
                  scale, C, BD, TE, EVEN_D, EVEN_TE, DFINAL, SEGMENTED, DINITIAL, True, True, PRECISION, LAZY,
                  STAGES)  # fmt: skip
        elif role < e_tiles + d_tiles:
            sweep(g, v, k, dq + batch * d_batch + head * D, g_row, v_row, k_row, H * D, initial + of_sequence, alone,
                  before, alone, before, False, 1, E, start, stop, (role - e_tiles) * TD, E, D, rate, scale, C,
                  BE, TD, EVEN_E, EVEN_TD, INITIAL, SEGMENTED, False, True, False, PRECISION, LAZY, STAGES)  # fmt: skip
        else:
            sweep(v, g, q, dk + batch * d_batch + head * D, v_row, g_row, q_row, H * D, dfinal + of_sequence, alone,
                  after, alone, after, False, 1, E, start, stop, (role - e_tiles - d_tiles) * TD, E, D, rate,
                  scale, C, BE, TD, EVEN_E, EVEN_TD, DFINAL, SEGMENTED, False, True, True, PRECISION, LAZY,
                  STAGES)  # fmt: skip
    elif role < e_tiles:
        start, stop = piece_from_start(start, stop, index, rate, L, M, PACKED)
        if is_first | (start >= stop):
            return
        sweep(k, q, g, dv, k_row, q_row, g_row, H * E, dfinal, False, after, True, after, True, E, 1, start, stop,
              role * TE, D, E, rate, scale, C, BD, TE, EVEN_D, EVEN_TE, False, False, True, False, True, PRECISION,
              LAZY, STAGES)  # fmt: skip
    else:
        start, stop = piece_from_end(start, stop, index, rate, L, M, PACKED)
        if is_last | (start >= stop):
            return
        sweep(g, v, k, dq, g_row, v_row, k_row, H * D, initial, False, before, True, before, True, 1, E, start,
              stop, (role - e_tiles) * TD, E, D, rate, scale, C, BE, TD, EVEN_E, EVEN_TD, False, False, True, False,
              False, PRECISION, LAZY, STAGES)  # fmt: skip


@triton.jit(do_not_specialize=["slots", "fresh", "cu_seqlens", "first", "at", "to", "P", "L", "H"])
def snapshot_kernel(k, v, k_row, k_head: "i64", v_row, v_head: "i64", log_decay, state, state_slot: "i64",
                    state_head: "i64", slots, fresh, between, cu_seqlens, first, at, to,
                    P, L, H, D, E, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, EVEN_D: tl.constexpr,
                    EVEN_E: tl.constexpr, PRECISION: tl.constexpr, LAZY: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """Write the state after ``at`` [N, P] rows of each packed sequence to the row ``to`` [N, P] of the pool ``state``.

    From the state before the segment that the snapshot is in, over its rows up to there.
    """
    tiles = tl.cdiv(E, BE)
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % H
    item = pid // tiles // H
    sequence = item // P
    start, rows, segment_, wanted = snapshot(cu_seqlens, slots, at, to, item, sequence, L)
    if not wanted:
        return
    alone = segment_ == 0
    between += ((tl.load(first + sequence) + segment_).to(tl.int64) * H + head) * D * E
    stop = start + rows
    start += segment_ * L
    target = of_state(to, item, state_slot) + head * state_head
    sweep(k, k + head * k_head, v + head * v_head, v, k_row, k_row, v_row, 0,
          state + of_state(slots, sequence, state_slot) + head * state_head, alone & inherits(fresh, sequence), between,
          alone, state + target, True, E, 1, start, stop, tile * BE, D, E, log2_decay(log_decay,
          head), 1.0, C, BD, BE, EVEN_D, EVEN_E, True, True, True, False, False, PRECISION, LAZY, STAGES)  # fmt: skip
