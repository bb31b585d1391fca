"""What each program of a kernel does, whatever the sweep: the rows and tensors it sweeps, from and to which states.

A ``SWEEP`` is the loop of one of ``sweeps``:

    SWEEP(a, b, c, out, decay_grad, rows, begin, end, shape, rate, scale, TILES, PACKED, TRANSPOSED, REVERSE)

a, b, c and out are whatever that loop reads and writes tensors by; without a, it has no output but a state.
``decay_grad``, None where nobody asks for the gradient of log_decay, says what it leaves for that. Where PACKED the
rows past ``rows.stop`` may be another sequence's; where TRANSPOSED b's columns are E's and c's D's.

A packed batch may be swept as one sequence, whose rows know their documents by ``rows.borders``. Then a score counts
where b's row ``is_within`` the border of a's, and the state that enters a block counts for rows whose border
``is_past`` the block. In the state that leaves it, the one that entered is kept if the block's ``nearest_border``
``is_past`` the block, and the rows that are ``is_within`` that border are added. What does not count is left out, not
multiplied by 0: it may be NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lightning_attention.kernels.triton.numerics import log2_decay
from lightning_attention.kernels.triton.work import (
    find_piece,
    find_segment,
    find_snapshot,
    is_whole_sequence,
    piece_from_end,
    piece_from_start,
    reach,
    rows_in_a_piece,
    starts_from_initial,
    state_offset,
)


class Rows(NamedTuple):
    """Rows start … stop of one head, and the first of the columns of c that the program has.

    borders [T] int32: where the document of each row begins or, for a reverse sweep, ends (the row past its last); None
    where all of the rows are of one document.
    """

    batch: tl.tensor
    head: tl.tensor
    start: tl.tensor
    stop: tl.tensor
    column: tl.tensor
    borders: tl.tensor


class Begin(NamedTuple):
    """What a sweep starts from, of all initial and boundary states: see ``first_state``."""

    initial: tl.tensor
    initial_offset: tl.tensor
    from_initial: tl.tensor
    boundary: tl.tensor
    boundary_offset: tl.tensor
    is_whole_sequence: tl.tensor


class DecayGradient(NamedTuple):
    """What a sweep adds to the gradient of log_decay, for dq or dk.

    partner: the tensor whose gradient it writes, as c is given; entered: the state [D, E] before its rows, if there is
    one and it is of the document that they begin with; sum: where it writes its part, one float32.

    The gradient is the sum over pairs s ≤ t of (t − s) times what s adds to t's output and its gradient. For pairs in
    two blocks, t − s is the rows from s to the end of its block, the blocks between, and the rows to t of t's block.
    The first and the last weigh, row by row, k · dk and q · dq as far as these come from other blocks. The blocks
    between weigh R, which goes backward with the state's gradient G,

        R ← λ^m (R + m G),

    and meets each block's own part of the state: Σ ⟨R, Σ_s λ^(m−1−s) k_sᵀ v_s⟩, and before all rows what entered. No
    two large numbers are subtracted. Pairs within a block the sweep for dq sums as they are.
    """

    partner: tl.tensor
    entered: tl.tensor
    is_entered: tl.tensor
    sum: tl.tensor


class End(NamedTuple):
    """Where a sweep leaves its state, and whether it does."""

    final: tl.tensor
    final_offset: tl.tensor
    is_stored: tl.tensor


class Operands(NamedTuple):
    """What a backward pass reads, in the widths that a sweep wants of a tensor."""

    q: tl.tensor
    k: tl.tensor
    v: tl.tensor
    dout: tl.tensor


@triton.jit
def widths(shape, TRANSPOSED: tl.constexpr):
    """Columns of b and of c."""
    b_width = shape.D
    c_width = shape.E
    if TRANSPOSED:
        b_width = shape.E
        c_width = shape.D
    return b_width, c_width


@triton.jit
def heads_read(rows, TILES: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Heads of a and b, and of c, that are read for a head of the output: q and k may have fewer than v and dout."""
    b_head = rows.head
    c_head = rows.head
    if TILES.group > 1:
        if TRANSPOSED:
            c_head = rows.head // TILES.group
        else:
            b_head = rows.head // TILES.group
    return b_head, c_head


@triton.jit
def state_pointers(base, b, c, shape, TRANSPOSED: tl.constexpr, COLUMNS_FIRST: tl.constexpr = False):
    """Where a program's part of a state [D, E] lies, columns c first, and which of it exists.

    COLUMNS_FIRST: it lies in memory as [E, D]; not with TRANSPOSED, which no pool is read by.
    """
    b_width, c_width = widths(shape, TRANSPOSED)
    if TRANSPOSED:
        where = base + c[:, None] * shape.E + b[None, :]
    elif COLUMNS_FIRST:
        where = base + c[:, None] * shape.D + b[None, :]
    else:
        where = base + c[:, None] + b[None, :] * shape.E
    return where, (c < c_width)[:, None] & (b < b_width)[None, :]


@triton.jit
def first_state(state, begin, b, c, shape, TRANSPOSED: tl.constexpr, COLUMNS_FIRST: tl.constexpr):
    """What a program starts from.

    The sequence's state where the segment is the whole sequence and starts from one, what the scan left between its
    segments, or ``state``, which is zero.
    """
    if begin.boundary is not None:
        where, exists = state_pointers(begin.boundary + begin.boundary_offset, b, c, shape, TRANSPOSED)
        if begin.initial is not None:
            if not begin.is_whole_sequence:
                state = tl.load(where, mask=exists, other=0.0)
        else:  # a mask, where a branch takes registers that Hopper's loop does not have
            state = tl.load(where, mask=exists & (not begin.is_whole_sequence), other=0.0)
    if begin.initial is not None:
        if begin.from_initial:
            start, inside = state_pointers(begin.initial + begin.initial_offset, b, c, shape, TRANSPOSED,
                                           COLUMNS_FIRST)  # fmt: skip
            state = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    return state


@triton.jit
def either(condition, x, y):
    """One of two pointers. As numbers, because Triton 3.6 cannot choose between pointers on AMD's chips."""
    return tl.where(condition, x.to(tl.int64), y.to(tl.int64)).to(x.dtype)


@triton.jit
def forward_segment(SWEEP: tl.constexpr, q, k, v, out, log_decay, pool, boundary_states, plan, shape, scale, index,
                    head, column, TILES: tl.constexpr):  # fmt: skip
    segment = find_segment(plan, index, shape.T)
    if segment.sequence >= 0:
        PACKED: tl.constexpr = plan.segment_table is not None or plan.begins is not None
        SPLIT: tl.constexpr = boundary_states is not None
        is_whole = is_whole_sequence(segment, plan, SPLIT)
        of_sequence = state_offset(pool.slots, segment.sequence, pool.slot_stride, head, pool.head_stride)
        of_segment = (segment.boundary_index.to(tl.int64) * shape.H + head) * shape.D * shape.E
        SWEEP(q, k, v, out, None,
              Rows(segment.batch, head, segment.start, segment.stop, column, plan.begins),
              Begin(pool.initial, of_sequence, is_whole & starts_from_initial(pool.fresh, segment.sequence),
                    boundary_states, of_segment, is_whole), End(pool.final, of_sequence, segment.is_last), shape,
              log2_decay(log_decay, head), scale, TILES, PACKED, False, False)  # fmt: skip


@triton.jit
def forward(SWEEP: tl.constexpr, q, k, v, out, log_decay, pool, boundary_states, plan, shape, scale, segment_count,
            TILES: tl.constexpr, PERSISTENT: tl.constexpr):  # fmt: skip
    """out = sweep(q, k, v).

    A program has TE columns of one head in one segment or, where PERSISTENT, in one after another.
    """
    tiles = tl.cdiv(shape.E, TILES.TE)
    pid = tl.program_id(0)
    column = pid % tiles * TILES.TE
    head = pid // tiles % shape.H
    first = pid // tiles // shape.H
    if PERSISTENT:
        for index in range(first, segment_count, tl.num_programs(0) // tiles // shape.H):
            forward_segment(SWEEP, q, k, v, out, log_decay, pool, boundary_states, plan, shape, scale, index, head,
                            column, TILES)  # fmt: skip
    else:
        forward_segment(SWEEP, q, k, v, out, log_decay, pool, boundary_states, plan, shape, scale, first, head, column,
                        TILES)  # fmt: skip


@triton.jit
def backward(SWEEP: tl.constexpr, whole, tile, dq, dk, dv, log_decay, initial, dfinal, dinitial, states_before,
             grads_after, decay_sums, plan, shape, scale, TILES: tl.constexpr):  # fmt: skip
    """dv = reverse sweep(k, q, dout); dq = sweep(dout, v, k); dk = reverse sweep(v, dout, q), one role a program.

    The roles of a segment are neighbours, so that what one reads the others find in L2. ``whole`` and ``tile`` are the
    Operands by all of their columns, and by those that a program has.
    """
    e_tiles = tl.cdiv(shape.E, TILES.TE)
    d_tiles = tl.cdiv(shape.D, TILES.TD)
    roles = e_tiles + d_tiles + d_tiles
    pid = tl.program_id(0)
    role = roles - 1 - pid % roles  # dk first, which takes longest where log_decay gets a gradient
    head = pid // roles % shape.H
    segment = find_segment(plan, pid // roles // shape.H, shape.T)
    if segment.sequence < 0:
        return
    PACKED: tl.constexpr = plan.segment_table is not None or plan.begins is not None
    SPLIT: tl.constexpr = states_before is not None
    is_whole = is_whole_sequence(segment, plan, SPLIT)
    rate = log2_decay(log_decay, head)
    of_sequence = (segment.sequence.to(tl.int64) * shape.H + head) * shape.D * shape.E
    of_segment = (segment.boundary_index.to(tl.int64) * shape.H + head) * shape.D * shape.E
    start = segment.start
    stop = segment.stop
    forward_from = Begin(initial, of_sequence, is_whole, states_before, of_segment, is_whole)
    reverse_from = Begin(dfinal, of_sequence, is_whole, grads_after, of_segment, is_whole)
    of_dq = None
    of_dk = None
    if decay_sums is not None:
        target = decay_sums + (pid // roles * 2 * d_tiles + role - e_tiles)
        entered = target
        is_entered = start < stop
        if states_before is not None:
            entered = states_before + of_segment
            if initial is not None:
                entered = either(is_whole, initial + of_sequence, entered)
            else:
                is_entered = is_entered & (not is_whole)
        elif initial is not None:
            entered = initial + of_sequence
        else:
            is_entered = start < 0
        if plan.begins is not None:
            if is_entered:
                is_entered = tl.load(plan.begins + start) < start
        of_dq = DecayGradient(tile.q, entered, is_entered, target)
        of_dk = DecayGradient(tile.k, entered, is_entered, target)
    if role < e_tiles:
        SWEEP(whole.k, whole.q, tile.dout, dv, None,
              Rows(segment.batch, head, start, stop, role * TILES.TE, plan.ends), reverse_from,
              End(dinitial, of_sequence, segment.is_first), shape, rate, scale, TILES, PACKED, False,
              True)  # fmt: skip
    elif role < e_tiles + d_tiles:
        column = (role - e_tiles) * TILES.TD
        SWEEP(whole.dout, whole.v, tile.k, dq, of_dq,
              Rows(segment.batch, head, start, stop, column, plan.begins), forward_from,
              End(None, 0, False), shape, rate, scale, TILES, PACKED, True, False)  # fmt: skip
    else:
        column = (role - e_tiles - d_tiles) * TILES.TD
        SWEEP(whole.v, whole.dout, tile.q, dk, of_dk,
              Rows(segment.batch, head, start, stop, column, plan.ends), reverse_from,
              End(None, 0, False), shape, rate, scale, TILES, PACKED, True, True)  # fmt: skip


@triton.jit
def piece_state(SWEEP: tl.constexpr, b, c, log_decay, local_states, final, plan, piece_rows, last_piece_rows, shape,
                scale, index, head, column, TILES: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """The state that a piece would leave by itself.

    A sequence's last segment leaves none between segments. ``final`` is for what sequences leave: there a segment that
    is the whole sequence is one piece.
    """
    segment = find_piece(plan, piece_rows, index, shape.T)
    if segment.sequence >= 0:
        PACKED: tl.constexpr = plan.segment_table is not None or plan.begins is not None
        rate = log2_decay(log_decay, head)
        rows = rows_in_a_piece(segment.stop - segment.start, plan.segment_rows, piece_rows, last_piece_rows)
        ends = segment.is_last
        if REVERSE:
            ends = segment.is_first
        is_whole = segment.is_first & segment.is_last
        if final is not None:
            rows = tl.where(is_whole, plan.segment_rows, rows)
        matters = reach(rate, plan.segment_rows)
        if REVERSE:
            start, stop = piece_from_start(segment, rows, matters, plan.ends)
        else:
            start, stop = piece_from_end(segment, rows, matters, plan.begins)
        place = (segment.boundary_index.to(tl.int64) * segment.pieces + segment.piece) * shape.H + head
        target = local_states + place * shape.D * shape.E
        if final is not None:
            wanted = start < stop
            of_sequence = (segment.sequence.to(tl.int64) * shape.H + head) * shape.D * shape.E
            target = either(is_whole, final + of_sequence, target)
            if is_whole:
                wanted = segment.piece == 0
        else:
            wanted = (not ends) & (start < stop)
        if wanted:
            SWEEP(None, b, c, None, None, Rows(segment.batch, head, start, stop, column, None),
                  Begin(None, 0, False, None, 0, True), End(target, 0, True), shape, rate, scale, TILES, PACKED, False,
                  REVERSE)  # fmt: skip


@triton.jit
def states_in_direction(SWEEP: tl.constexpr, k, v, q, dout, log_decay, local_before, local_after, final, plan,
                        piece_rows, last_piece_rows, shape, scale, index, head, role,
                        TILES: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(shape.E, TILES.TE)
    if local_after is None:
        piece_state(SWEEP, k, v, log_decay, local_before, final, plan, piece_rows, last_piece_rows, shape, scale, index,
                    head, role * TILES.TE, TILES, False)  # fmt: skip
    elif local_before is None or role < tiles:
        piece_state(SWEEP, q, dout, log_decay, local_after, final, plan, piece_rows, last_piece_rows, shape, scale,
                    index, head, role * TILES.TE, TILES, True)  # fmt: skip
    else:
        piece_state(SWEEP, k, v, log_decay, local_before, final, plan, piece_rows, last_piece_rows, shape, scale, index,
                    head, (role - tiles) * TILES.TE, TILES, False)  # fmt: skip


@triton.jit
def states(SWEEP: tl.constexpr, k, v, q, dout, log_decay, local_before, local_after, final, plan, piece_rows,
           last_piece_rows, shape, scale, piece_count, TILES: tl.constexpr,
           PERSISTENT: tl.constexpr):  # fmt: skip
    """What pieces of segments would leave by themselves: the state after k and v, with time reversed its gradient.

    ``local_before`` is for the one, ``local_after`` for the other; a program has TE columns of one of them.
    """
    programs = tl.cdiv(shape.E, TILES.TE)
    if local_before is not None:
        if local_after is not None:
            programs = 2 * programs
    pid = tl.program_id(0)
    role = pid % programs
    head = pid // programs % shape.H
    first = pid // programs // shape.H
    if PERSISTENT:
        for index in range(first, piece_count, tl.num_programs(0) // programs // shape.H):
            states_in_direction(SWEEP, k, v, q, dout, log_decay, local_before, local_after, final, plan, piece_rows,
                                last_piece_rows, shape, scale, index, head, role, TILES)  # fmt: skip
    else:
        states_in_direction(SWEEP, k, v, q, dout, log_decay, local_before, local_after, final, plan, piece_rows,
                            last_piece_rows, shape, scale, first, head, role, TILES)  # fmt: skip


@triton.jit
def snapshot(SWEEP: tl.constexpr, k, v, log_decay, pool, boundary_states, cu_seqlens, first_boundary, snapshot_at,
             snapshot_slots, per_sequence, segment_rows, shape, TILES: tl.constexpr):  # fmt: skip
    """Write the state after ``snapshot_at`` [N, P] rows of each packed sequence to row ``snapshot_slots`` [N, P].

    From the state before the segment that the snapshot is in, over its rows up to there.
    """
    tiles = tl.cdiv(shape.E, TILES.TE)
    pid = tl.program_id(0)
    head = pid // tiles % shape.H
    index = pid // tiles // shape.H
    sequence = index // per_sequence
    start, rows, segment, wanted = find_snapshot(
        cu_seqlens, pool.slots, first_boundary, snapshot_at, snapshot_slots, index, sequence, segment_rows)  # fmt: skip
    if wanted:
        is_whole = segment == 0
        boundary = (tl.load(first_boundary + sequence) + segment).to(tl.int64) * shape.H + head
        of_sequence = state_offset(pool.slots, sequence, pool.slot_stride, head, pool.head_stride)
        target = state_offset(snapshot_slots, index, pool.slot_stride, head, pool.head_stride)
        SWEEP(None, k, v, None, None,
              Rows(0, head, start + segment * segment_rows, start + rows, pid % tiles * TILES.TE, None),
              Begin(pool.initial, of_sequence, is_whole & starts_from_initial(pool.fresh, sequence), boundary_states,
                    boundary * shape.D * shape.E, is_whole),
              End(pool.final, target, True), shape, log2_decay(log_decay, head), 1.0, TILES, True, False,
              False)  # fmt: skip
