"""Cutting sequences into segments that are swept at once, and joining the states between them.

No kernel here is specialized on a number, which the calls by ``launcher.run`` rely on.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import launch, launcher
from lightning_attention.kernels.triton.part import (
    inherits,
    log2_decay,
    of_state,
    piece_rows,
    reach,
    whole_and_rest,
)

#: Rows, at most, in a segment of a packed batch, whose lengths nobody knows. 131072 rows at H 32, D 128, forward, one
#: sequence of 98304 among 64 others: 1.45 ms (long one first), 1.69 with 4096, 1.93 with 2048; dense 1.26.
PACKED_SEGMENT = 16384


class Segments(NamedTuple):
    """The segments of a call.

    rows: in each but a sequence's last; piece: rows of the pieces whose own states are summed to a segment's;
    per_sequence: of a dense batch; count: of all, at most; full: of those that may not be their sequence's last, at
    most; cut: whether any sequence may have two; states: how many lie between segments, at most; table [count, 5],
    first [N + 1] and joined, of a packed batch: what ``plan_kernel`` writes.
    """

    rows: int
    piece: int
    per_sequence: int
    count: int
    full: int
    cut: bool
    states: int
    table: Tensor | None = None
    first: Tensor | None = None
    joined: Tensor | None = None

    @property
    def reads_sequences(self) -> bool:
        """Whether any segment starts from its sequence's state; of a dense batch that is cut the scan has them all."""
        return self.table is not None or not self.cut

    @property
    def pieces(self) -> int:
        """Of a segment."""
        return -(-self.rows // self.piece)

    def room(self, like: Tensor, E: int, directions: int = 1) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """For what pieces leave, [states · pieces, H, D, E] float32, and for the states between segments.

        The same tensors where a segment is one piece; ``like``: [B, T, H, D].
        """
        H, D = like.shape[2:]

        def tensors(states: int) -> tuple[Tensor, ...]:
            return torch.empty(directions, states, H, D, E, dtype=torch.float32, device=like.device).unbind()

        between = tensors(self.states)
        return between if self.pieces == 1 else tensors(self.states * self.pieces), between


def dense(B: int, T: int, C: int, width: int, programs: int, places: int, batch_invariant: bool) -> Segments:
    """Of a batch of B rows; ``width``: the larger of D and E.

    ``programs``: how many one segment of one sequence makes; ``places``: how many run at once.
    """
    rows = -(-T // C) * C if batch_invariant else launch.segment_rows(programs * B, T, C, places)
    count = -(-T // rows)
    return Segments(rows, launch.piece_rows(rows, width), count, B * count, B * count, count > 1, B * count)


def packed(
    cu_seqlens: Tensor,
    T: int,
    C: int,
    width: int,
    programs: int,
    places: int,
    batch_invariant: bool,
    slots: Tensor | None = None,
    short: int = -1,
) -> Segments:
    """The same of a packed batch; sequences of at most ``short`` rows, and those whose slot is negative, get none."""
    rows = -(-T // C) * C
    if not batch_invariant:
        rows = min(PACKED_SEGMENT, launch.segment_rows(programs, T, C, places))
    N = cu_seqlens.shape[0] - 1
    full = T // rows
    count = full + N
    most = max(full, 1)  # sequences with more than one
    parts = 5 * count, N + 1, most
    table, first, joined = torch.empty(sum(parts), dtype=torch.int32, device=cu_seqlens.device).split(parts)
    args = (cu_seqlens, slots, table, first, joined, N, rows, count, most, short)
    key = (cu_seqlens.device.index, *launcher.dtypes(cu_seqlens, slots))
    launcher.run(plan_kernel, (1, 1, 1), args, key, lambda: {"BLOCK": 1024})
    return Segments(rows, launch.piece_rows(rows, width), 0, count, full, rows < T, 2 * full, table, first, joined)


def cut(
    B: int, T: int, cu_seqlens: Tensor | None, C: int, width: int, programs: int, places: int, batch_invariant: bool
) -> Segments:
    """``dense`` or, with ``cu_seqlens``, ``packed``."""
    if cu_seqlens is None:
        return dense(B, T, C, width, programs, places, batch_invariant)
    return packed(cu_seqlens, T, C, width, programs, places, batch_invariant)


def scan(
    cut: Segments,
    own: tuple[Tensor, ...],
    between: tuple[Tensor, ...],
    initial: Tensor | None,
    dfinal: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    N: int,
    T: int,
    slots: Tensor | None = None,
    fresh: Tensor | None = None,
) -> None:
    """From what each piece leaves by itself to the states between segments, as ``Segments.room`` has them.

    What comes before segments and, in the second of two directions, after them.
    """
    _, H, D, E = between[0].shape
    block = min(1024, triton.next_power_of_2(D * E))
    flags = (len(between) > 1, initial is not None, dfinal is not None)
    of_pool = initial if initial is not None else between[0]
    args = (
        own[0], own[-1], between[0], between[-1], *(between[0] if x is None else x for x in (initial, dfinal)),
        *of_pool.stride()[:2], slots, fresh, log_decay, cu_seqlens, cut.first, cut.joined, cut.per_sequence, cut.rows,
        cut.piece, T, H, D * E,
    )  # fmt: skip
    indices = launcher.dtypes(cu_seqlens, slots, fresh)
    launcher.run(
        scan_kernel, (N if cut.joined is None else cut.joined.shape[0], H, -(-D * E // block)), args,
        (of_pool.device.index, log_decay is None, block, flags, indices, of_pool.dtype),
        lambda: {
            **dict(zip(("AFTER", "INITIAL", "DFINAL"), flags, strict=True)), "PIECES": launch.PIECES, "BLOCK": block,
        },
    )  # fmt: skip


def clear_padding(cu_seqlens: Tensor, T: int, *outputs: Tensor, slots: Tensor | None = None) -> None:
    """Zero the rows, of up to three contiguous outputs of T rows, that belong to no sequence or to one without slot."""
    x, y, z = (outputs * 3)[:3]
    widths = [t.shape[-2] * t.shape[-1] if i < len(outputs) else 0 for i, t in enumerate((x, y, z))]
    N = cu_seqlens.shape[0] - 1
    sequences = 0 if slots is None else N
    args = (x, y, z, cu_seqlens, slots, N, sequences, T, *widths)
    key = (x.device.index, *launcher.dtypes(x, cu_seqlens, slots))
    grid = (sequences + -(-T // 64), 1, 1)
    launcher.run(clear_padding_kernel, grid, args, key, lambda: {"ROWS": 64, "BLOCK": 1024})


@triton.jit
def lengths(cu_seqlens, slots, sequence, N, short):
    """Of sequences, a vector: first row, number of rows, and whether they get segments."""
    real = sequence < N
    start = tl.load(cu_seqlens + sequence, mask=real, other=0).to(tl.int32)
    stop = tl.load(cu_seqlens + sequence + 1, mask=real, other=0).to(tl.int32)
    taken = real & (stop - start > short)
    if slots is not None:
        taken = taken & (tl.load(slots + sequence, mask=real, other=-1) >= 0)
    return start, stop - start, taken


@triton.jit
def write_segment(table, place, sequence, begin, end, is_first, is_last, slot, here):
    row = table + place * 5
    tl.store(row, sequence, mask=here)
    tl.store(row + 1, begin, mask=here)
    tl.store(row + 2, end, mask=here)
    tl.store(row + 3, tl.where(is_first, 1, 0) + tl.where(is_last, 2, 0), mask=here)
    tl.store(row + 4, slot, mask=here)


@triton.jit(do_not_specialize=["cu_seqlens", "slots", "table", "first", "joined", "N", "L", "count", "most", "short"])
def plan_kernel(cu_seqlens, slots, table, first, joined, N, L, count, most, short, BLOCK: tl.constexpr):
    """Lay out the segments of a packed batch, with no look at the lengths on the host.

    table [count, 5], in the order in which programs are started, long segments first: sequence (-1: none), first row,
    row past the last, 1 · first of its sequence + 2 · last of it, and slot, the place of the state before it, where its
    sequence has more than one. first [N + 1]: the slot of each sequence's first segment, and the number of slots.
    joined [most]: the sequences that have more than one, -1 after them. A sequence with no row has one segment with
    none, which carries its state over.
    """
    used = 0
    placed = 0
    pairs = 0
    for n in range(0, N, BLOCK):
        sequence = n + tl.arange(0, BLOCK)
        start, length, taken = lengths(cu_seqlens, slots, sequence, N, short)
        pieces = tl.where(taken, tl.maximum(tl.cdiv(length, L), 1), 0)
        states = tl.where(pieces > 1, pieces, 0)
        slot = used + tl.cumsum(states, 0) - states
        tl.store(first + sequence, slot, mask=sequence < N)
        full = tl.where(taken, length // L, 0)
        place = placed + tl.cumsum(full, 0) - full
        for i in range(0, tl.max(full, 0)):
            begin = start + i * L
            write_segment(table, place + i, sequence, begin, begin + L, i == 0, i == pieces - 1, slot + i, i < full)
        several = (pieces > 1).to(tl.int32)
        tl.store(joined + pairs + tl.cumsum(several, 0) - 1, sequence, mask=several > 0)
        pairs += tl.sum(several, 0)
        used += tl.sum(states, 0)
        placed += tl.sum(full, 0)
    tl.store(first + N, used)
    # What is left of each sequence: a quarter of L rows or more, or fewer.
    upper = L
    for part in tl.static_range(2):
        lower = 0
        if part == 0:
            lower = tl.cdiv(L, 4)
        used = 0
        for n in range(0, N, BLOCK):
            sequence = n + tl.arange(0, BLOCK)
            start, length, taken = lengths(cu_seqlens, slots, sequence, N, short)
            pieces = tl.where(taken, tl.maximum(tl.cdiv(length, L), 1), 0)
            states = tl.where(pieces > 1, pieces, 0)
            slot = used + tl.cumsum(states, 0) - 1
            full = length // L
            rest = length - full * L
            here = taken & (pieces > full) & (rest >= lower) & (rest < upper)
            place = placed + tl.cumsum(here.to(tl.int32), 0) - 1
            begin = start + full * L
            write_segment(table, place, sequence, begin, begin + rest, full == 0, full >= 0, slot, here)
            used += tl.sum(states, 0)
            placed += tl.sum(here.to(tl.int32), 0)
        upper = lower
    for n in range(pairs, most, BLOCK):
        place = n + tl.arange(0, BLOCK)
        tl.store(joined + place, -1, mask=place < most)
    for n in range(placed, count, BLOCK):
        place = n + tl.arange(0, BLOCK)
        tl.store(table + place * 5, -1, mask=place < count)


@triton.jit
def own_state(own, segment, length, head, col, inside, rate, L, M, H, SIZE, PACKED: tl.constexpr,
              PIECES: tl.constexpr):  # fmt: skip
    """What a segment of ``length`` rows leaves by itself, from what its pieces do, the ones next to its end first.

    All loads at once: one after another, each would wait for the one before.
    """
    i = tl.arange(0, PIECES)
    pieces = tl.cdiv(L, M)
    M = piece_rows(length, L, M, PACKED)
    written = tl.cdiv(tl.minimum(reach(rate, L), length), M)
    where = own + ((segment.to(tl.int64) * pieces + i) * H + head)[:, None] * SIZE + col[None, :]
    states = tl.load(where, mask=(i < written)[:, None] & inside[None, :], other=0.0)
    return tl.sum(tl.exp2(rate * (i * M))[:, None] * states, 0)


@triton.jit(do_not_specialize=["before_own", "after_own", "before", "after", "initial", "dfinal", "state_slot",
                               "state_head", "slots", "fresh", "log_decay", "cu_seqlens", "first", "joined", "segments",
                               "L", "M", "T", "H", "SIZE"])  # fmt: skip
def scan_kernel(before_own, after_own, before, after, initial, dfinal, state_slot: "i64", state_head: "i64", slots,
                fresh, log_decay, cu_seqlens, first, joined, segments, L, M, T, H, SIZE, AFTER: tl.constexpr,
                INITIAL: tl.constexpr, DFINAL: tl.constexpr, PIECES: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """From what pieces of M rows leave by themselves to the states between segments.

    before[s] = λ^len(s−1) before[s−1] + own[s−1], and with AFTER the mirror of it for the gradients. States are
    [states, H, SIZE], of pieces [states · pieces, H, SIZE], and the same memory where a segment is one piece. They
    differ by one factor a head, so they are scanned as flat numbers. Packed sequences of one segment are left alone:
    their states are where they were.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    col = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = col < SIZE
    rate = log2_decay(log_decay, head)
    if joined is not None:
        sequence = tl.load(joined + sequence)
        if sequence < 0:
            return
    begin = sequence * segments
    end = begin + segments
    length = T
    PACKED: tl.constexpr = cu_seqlens is not None
    if PACKED:
        begin = tl.load(first + sequence)
        end = tl.load(first + sequence + 1)
        length = (tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)).to(tl.int32)
    whole, rest = whole_and_rest(rate * L * 0.6931471805599453)
    state = tl.zeros([BLOCK], tl.float32)
    if INITIAL:
        if inherits(fresh, sequence):
            where = initial + of_state(slots, sequence, state_slot) + head * state_head + col
            state = tl.load(where, mask=inside).to(tl.float32)
    own = own_state(before_own, begin, L, head, col, inside, rate, L, M, H, SIZE, PACKED, PIECES)
    for i in range(0, end - begin):
        s = begin + i
        # The last segment's nobody wrote, and nobody uses.
        ahead = own_state(before_own, tl.minimum(s + 1, end - 1), L, head, col, inside, rate, L, M, H, SIZE, PACKED,
                          PIECES)  # fmt: skip
        tl.debug_barrier()  # what another thread has yet to read may be the same memory
        tl.store(before + (s.to(tl.int64) * H + head) * SIZE + col, state, mask=inside)
        state = whole * state + (rest * state + own)
        own = ahead
    if AFTER:
        state = tl.zeros([BLOCK], tl.float32)
        if DFINAL:
            state = tl.load(dfinal + (sequence.to(tl.int64) * H + head) * SIZE + col, mask=inside)
        rows = length - (end - begin - 1) * L  # only a sequence's last segment can have fewer than L
        own = own_state(after_own, end - 1, rows, head, col, inside, rate, L, M, H, SIZE, PACKED, PIECES)
        first_whole, first_rest = whole_and_rest(rate * rows * 0.6931471805599453)
        for i in range(0, end - begin):
            s = end - 1 - i
            ahead = own_state(after_own, tl.maximum(s - 1, begin), L, head, col, inside, rate, L, M, H, SIZE, PACKED,
                              PIECES)  # fmt: skip
            tl.debug_barrier()  # what another thread has yet to read may be the same memory
            tl.store(after + (s.to(tl.int64) * H + head) * SIZE + col, state, mask=inside)
            state = first_whole * state + (first_rest * state + own)
            own = ahead
            first_whole = whole
            first_rest = rest


@triton.jit
def clear_rows(x, start, stop, width, BLOCK: tl.constexpr):
    for row in range(start, stop):
        for column in range(0, width, BLOCK):
            col = column + tl.arange(0, BLOCK)
            tl.store(x + row * width + col, 0.0, mask=col < width)


@triton.jit(do_not_specialize=["x", "y", "z", "cu_seqlens", "slots", "N", "sequences", "T", "x_width", "y_width",
                               "z_width"])  # fmt: skip
def clear_padding_kernel(x, y, z, cu_seqlens, slots, N, sequences, T, x_width, y_width, z_width, ROWS: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """Zero rows of up to three contiguous [T, width]; most programs have none to do.

    Those of the first ``sequences`` sequences that have no slot, and those past the last sequence.
    """
    pid = tl.program_id(0)
    first = tl.load(cu_seqlens + N).to(tl.int64)
    start = (pid - sequences).to(tl.int64) * ROWS
    stop = tl.minimum(start + ROWS, T)
    start = tl.maximum(start, first)
    if slots is not None:
        if pid < sequences:
            start = tl.load(cu_seqlens + pid).to(tl.int64)
            stop = start
            if tl.load(slots + pid) < 0:
                stop = tl.load(cu_seqlens + pid + 1).to(tl.int64)
    if start >= stop:
        return
    clear_rows(x, start, stop, x_width, BLOCK)
    clear_rows(y, start, stop, y_width, BLOCK)
    clear_rows(z, start, stop, z_width, BLOCK)
