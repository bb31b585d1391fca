"""Joining the states that pieces of segments leave by themselves to the states between segments."""

import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import log2_decay, whole_and_rest
from lightning_attention.kernels.triton.plan import Plan
from lightning_attention.kernels.triton.tiling import PIECES
from lightning_attention.kernels.triton.work import (
    is_past,
    nearest_border,
    reach,
    rows_in_a_piece,
    starts_from_initial,
    state_offset,
)


def scan(
    plan: Plan, log_decay: Tensor | None, cu_seqlens: Tensor | None, N: int, T: int,
    before: tuple[Tensor, Tensor] | None, after: tuple[Tensor, Tensor] | None = None, initial: Tensor | None = None,
    dfinal: Tensor | None = None, final: Tensor | None = None, slots: Tensor | None = None,
    fresh: Tensor | None = None, columns_first: bool = False,
) -> None:  # fmt: skip
    """From local states to boundary states, a pair of them as ``Plan.allocate_states`` has them.

    ``before``: those before segments, starting from ``initial``; ``after``: the gradients of those after segments,
    starting from ``dfinal``. ``final`` [N, H, D, E]: also what is left at the other end, of sequences that are split.
    ``columns_first``: the states of ``initial`` lie in memory as [E, D].
    """
    local_before, states_before = before or (None, None)
    local_after, grads_after = after or (None, None)
    (some, _) = before or after  # type: ignore[misc]
    _, H, D, E = some.shape
    columns = E if columns_first else 0
    block = min(1024, triton.next_power_of_2(D * E))
    strides = (0, 0) if initial is None else initial.stride()[:2]
    if plan.begins is not None:  # then the documents are one sequence
        cu_seqlens, N = None, 1
    args = (
        local_before, local_after, states_before, grads_after, initial, dfinal, final, *strides, slots, fresh,
        log_decay, cu_seqlens, plan.first_boundary, plan.split_sequences, plan.segments_per_sequence,
        plan.segment_rows, plan.begins, plan.ends, plan.piece_rows, plan.last_piece_rows, T, H, D * E,
    )  # fmt: skip
    grid = (N if plan.split_sequences is None else plan.split_sequences.shape[0], H, -(-D * E // block))
    dispatch.run(scan_kernel, grid, args, (PIECES, block, columns), 4, some.get_device())


@triton.jit
def joined(state, local, whole, rest):
    """λ^n S + local, λ^n = whole + rest, in fused products and sums: said outright, it rounds the same in every kernel.

    Where a state between segments is the last one of its call, the same state is made by another kernel.
    """
    change = tl.fma(tl.full(state.shape, rest, tl.float32), state, local)
    return tl.fma(tl.full(state.shape, whole, tl.float32), state, change)


@triton.jit
def local_state(local_states, segment, rows, head, col, inside, rate, segment_rows, piece_rows, last_piece_rows, H,
                SIZE, PIECES: tl.constexpr):  # fmt: skip
    """What a segment of so many rows leaves by itself, from what its pieces do, the ones next to its end first.

    All loads at once: one after another, each would wait for the one before.
    """
    i = tl.arange(0, PIECES)
    pieces = tl.cdiv(segment_rows, piece_rows)
    in_piece = rows_in_a_piece(rows, segment_rows, piece_rows, last_piece_rows)
    written = tl.cdiv(tl.minimum(reach(rate, segment_rows), rows), in_piece)
    where = local_states + ((segment.to(tl.int64) * pieces + i) * H + head)[:, None] * SIZE + col[None, :]
    states = tl.load(where, mask=(i < written)[:, None] & inside[None, :], other=0.0)
    return tl.sum(tl.exp2(rate * (i * in_piece))[:, None] * states, 0)


@triton.jit
def own_rows(borders, segment, segment_rows, used, REVERSE: tl.constexpr):
    """How many rows the local state of a segment is of, and whether the state before (after) it outlives it.

    ``used``: how many rows have a document.
    """
    start = segment * segment_rows
    end = start + segment_rows
    stop = tl.maximum(tl.minimum(end, used), start)
    border = nearest_border(borders, start, stop, REVERSE)
    if REVERSE:
        rows = tl.minimum(stop, border) - start
    else:
        rows = stop - tl.maximum(start, border)
    return rows, is_past(border, start, end, REVERSE)


@dispatch.unspecialized(triton.jit)
def scan_kernel(local_before, local_after, states_before, grads_after, initial, dfinal, final,
                state_slot_stride: "i64", state_head_stride: "i64", slots, fresh, log_decay, cu_seqlens, first_boundary,
                split_sequences, segments_per_sequence, segment_rows, begins, ends, piece_rows, last_piece_rows, T, H,
                SIZE, PIECES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """From what pieces leave by themselves to the states between segments.

    states_before[s] = λ^len(s−1) states_before[s−1] + local[s−1], and the mirror of it for the gradients. States are
    [states, H, SIZE], of pieces [states · pieces, H, SIZE], and the same memory where a segment is one piece. They
    differ by one factor a head, so they are scanned as flat numbers. Packed sequences of one segment are left alone:
    their states are where they were. Where there are documents, a state goes past a segment only if one does.
    COLUMNS is E where the states of ``initial`` lie as [E, D], and else 0.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    col = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = col < SIZE
    rate = log2_decay(log_decay, head)
    if split_sequences is not None:
        sequence = tl.load(split_sequences + sequence)
        if sequence < 0:
            return
    begin = sequence * segments_per_sequence
    end = begin + segments_per_sequence
    length = T
    if cu_seqlens is not None:
        begin = tl.load(first_boundary + sequence)
        end = tl.load(first_boundary + sequence + 1)
        length = (tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)).to(tl.int32)
    if begins is not None:
        used = tl.load(begins + T)
    rows = length - (end - begin - 1) * segment_rows  # only a sequence's last segment can have fewer than the others
    of_sequence = (sequence.to(tl.int64) * H + head) * SIZE + col
    whole, rest = whole_and_rest(rate * segment_rows * 0.6931471805599453)
    last_whole, last_rest = whole_and_rest(rate * rows * 0.6931471805599453)
    if local_before is not None:
        state = tl.zeros([BLOCK], tl.float32)
        if initial is not None:
            if starts_from_initial(fresh, sequence):
                place = col
                if COLUMNS > 0:
                    place = col % COLUMNS * (SIZE // COLUMNS) + col // COLUMNS
                where = initial + state_offset(slots, sequence, state_slot_stride, head, state_head_stride) + place
                state = tl.load(where, mask=inside).to(tl.float32)
        own = segment_rows
        if begins is not None:
            own, outlives = own_rows(begins, begin, segment_rows, used, False)
        local = local_state(local_before, begin, own, head, col, inside, rate, segment_rows, piece_rows,
                            last_piece_rows, H, SIZE, PIECES)  # fmt: skip
        for i in range(0, end - begin - 1):
            s = begin + i
            ahead_rows = segment_rows
            if final is not None:  # which is all that the last segment's matters to
                ahead_rows = tl.where(s + 2 == end, rows, segment_rows)
            if begins is not None:
                ahead_rows, ahead_outlives = own_rows(begins, s + 1, segment_rows, used, False)
            ahead = local_state(local_before, s + 1, ahead_rows, head, col, inside, rate, segment_rows, piece_rows,
                                last_piece_rows, H, SIZE, PIECES)  # fmt: skip
            tl.debug_barrier()  # what another thread has yet to read may be the same memory
            tl.store(states_before + (s.to(tl.int64) * H + head) * SIZE + col, state, mask=inside)
            passed = joined(state, local, whole, rest)
            if begins is not None:
                passed = tl.where(outlives, passed, local)
                outlives = ahead_outlives
            state = passed
            local = ahead
        tl.debug_barrier()
        tl.store(states_before + ((end - 1).to(tl.int64) * H + head) * SIZE + col, state, mask=inside)
        if final is not None:
            tl.store(final + of_sequence, joined(state, local, last_whole, last_rest), mask=inside)
    if local_after is not None:
        state = tl.zeros([BLOCK], tl.float32)
        if dfinal is not None:
            state = tl.load(dfinal + of_sequence, mask=inside)
        own = rows
        if begins is not None:
            own, outlives = own_rows(ends, end - 1, segment_rows, used, True)
        local = local_state(local_after, end - 1, own, head, col, inside, rate, segment_rows, piece_rows,
                            last_piece_rows, H, SIZE, PIECES)  # fmt: skip
        for i in range(0, end - begin):
            s = end - 1 - i
            before = tl.maximum(s - 1, begin)
            ahead_rows = segment_rows
            if begins is not None:
                ahead_rows, ahead_outlives = own_rows(ends, before, segment_rows, used, True)
            ahead = local_state(local_after, before, ahead_rows, head, col, inside, rate, segment_rows, piece_rows,
                                last_piece_rows, H, SIZE, PIECES)  # fmt: skip
            tl.debug_barrier()  # what another thread has yet to read may be the same memory
            tl.store(grads_after + (s.to(tl.int64) * H + head) * SIZE + col, state, mask=inside)
            passed = joined(state, local, last_whole, last_rest)
            if begins is not None:
                passed = tl.where(outlives, passed, local)
                outlives = ahead_outlives
            state = passed
            local = ahead
            last_whole = whole
            last_rest = rest
        if final is not None:
            tl.store(final + of_sequence, state, mask=inside)
