"""How the sequences of a call are split into segments that are swept at once."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.backend import INVARIANT_CHUNK
from lightning_attention.kernels.triton import dispatch, tiling
from lightning_attention.kernels.triton.tiling import Tiling

#: Rows, at most, in a segment of a packed batch, whose lengths nobody knows. 131072 rows at H 32, D 128, forward, one
#: sequence of 98304 among 64 others: 1.45 ms (long one first), 1.69 with 4096, 1.93 with 2048; dense 1.26.
PACKED_SEGMENT = 16384


class Plan(NamedTuple):
    """The segments of a call.

    segment_rows: in each segment but a sequence's last; piece_rows: in the pieces whose own states are summed to a
    segment's; last_piece_rows: in those of a last segment that is shorter; segments_per_sequence: of a dense batch;
    segment_count: of all sequences, at most; full_segments: those that may not be their sequence's last, at most;
    is_split: whether any sequence may have two; boundary_count: how many states lie between segments, at most. For a
    packed batch, as ``plan_kernel`` writes them: segment_table [segment_count, 5], first_boundary [N + 1] and
    split_sequences. For documents, as ``documents_kernel`` does: begins and, for a backward pass, ends [T + 1].
    """

    segment_rows: int
    piece_rows: int
    last_piece_rows: int
    segments_per_sequence: int
    segment_count: int
    full_segments: int
    is_split: bool
    boundary_count: int
    segment_table: Tensor | None = None
    first_boundary: Tensor | None = None
    split_sequences: Tensor | None = None
    begins: Tensor | None = None
    ends: Tensor | None = None

    @property
    def segmentation(self) -> tuple[Any, ...]:
        """As kernels take it: the fields of ``work.Segmentation``."""
        return self.segment_table, self.segments_per_sequence, self.segment_rows, self.begins, self.ends

    @property
    def uses_initial_state(self) -> bool:
        """Whether a segment may start from its sequence's state: in a dense batch that is split, the scan does."""
        return self.segment_table is not None or not self.is_split

    @property
    def pieces(self) -> int:
        """Pieces of a segment."""
        return -(-self.segment_rows // self.piece_rows)

    def allocate_states(
        self, k: Tensor, v: Tensor, directions: int = 1
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Local states, of pieces, [boundary_count · pieces, H, D, E] float32, and boundary states, between segments.

        The same tensors where a segment is one piece; k: [B, T, Hk, D], v: [B, T, H, E].
        """
        (H, E), D = v.shape[2:], k.shape[3]

        def tensors(count: int) -> tuple[Tensor, ...]:
            return tuple(torch.empty(count, H, D, E, dtype=torch.float32, device=k.device) for _ in range(directions))

        boundary_states = tensors(self.boundary_count)
        local_states = boundary_states if self.pieces == 1 else tensors(self.boundary_count * self.pieces)
        return local_states, boundary_states


def plan_dense(
    B: int, T: int, width: int, chosen: Tiling, programs: int, batch_invariant: bool, final: bool = False
) -> Plan:
    """Plan a batch of B sequences; ``width``: the larger of D and E; ``programs``: those of a sequence's segment.

    The rest as in ``plan_packed``.
    """
    rows = INVARIANT_CHUNK
    if not batch_invariant:
        rows = tiling.segment_rows(programs * B, T, chosen.tiles.C, chosen.resident_programs)
    piece_rows = tiling.piece_rows(rows, width)
    each = -(-(T + (batch_invariant and final)) // rows)
    last = rows if batch_invariant else piece_rows
    return Plan(rows, piece_rows, last, each, B * each, B * each, each > 1, B * each)


def plan_packed(
    cu_seqlens: Tensor, T: int, width: int, chosen: Tiling, programs: int, batch_invariant: bool, final: bool = False,
    slots: Tensor | None = None, short: int = -1,
) -> Plan:  # fmt: skip
    """Plan a packed batch; sequences of at most ``short`` rows, and those whose slot is negative, get no segment.

    ``batch_invariant``: every sequence is cut after so many rows from its own beginning, whatever else there is. For
    ``final`` states one that ends at such a place has a segment of no rows more, whose state is the scan's: the one
    that a longer sequence would have there. A last segment that is shorter is always one piece, because there may be
    very many, and in a dense batch so that the sums are the same.
    """
    rows = INVARIANT_CHUNK
    if not batch_invariant:
        rows = min(PACKED_SEGMENT, tiling.segment_rows(programs, T, chosen.tiles.C, chosen.resident_programs))
    extra = int(batch_invariant and final)
    N = cu_seqlens.shape[0] - 1
    full = T // rows
    count = full + N
    most = max(full, 1)  # sequences with more than one
    parts = 5 * count, N + 1, most
    table, first, split = torch.empty(sum(parts), dtype=torch.int32, device=cu_seqlens.device).split(parts)
    args = (cu_seqlens, slots, table, first, split, N, rows, count, most, short, extra)
    dispatch.run(plan_kernel, (1, 1, 1), args, (1024,), 4, cu_seqlens.get_device())
    piece_rows = tiling.piece_rows(rows, width)
    return Plan(rows, piece_rows, rows, 0, count, full, rows < T + extra, 2 * full, table, first, split)


def plan_documents(cu_seqlens: Tensor, T: int, width: int, chosen: Tiling, programs: int, reverse: bool) -> Plan:
    """Plan a packed batch whose states nobody has or wants: one sequence of T rows, in which masks part documents.

    What it costs does not depend on their lengths. ``reverse``: whether it is swept with time reversed, too.
    """
    dense = plan_dense(1, T, width, chosen, programs, False)
    N = cu_seqlens.shape[0] - 1
    begins, *ends = torch.empty(1 + reverse, T + 1, dtype=torch.int32, device=cu_seqlens.device).unbind()
    args = (cu_seqlens, begins, ends[0] if reverse else None, N, 1 << N.bit_length() >> 1, T)
    dispatch.run(documents_kernel, (T // 256 + 1, 1, 1), args, (256,), 4, cu_seqlens.get_device())
    return dense._replace(begins=begins, ends=args[2])


def plan(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chosen: Tiling, programs: int, batch_invariant: bool,
    has_states: bool, final: bool = False, reverse: bool = False,
) -> Plan:  # fmt: skip
    """Plan the segments of k [B, T, Hk, D] and v [B, T, H, E], which are packed if there is ``cu_seqlens``.

    ``has_states``: whether sequences have states, or gradients of them, that the call is given or returns; ``final``:
    whether final ones are wanted.
    """
    B, T, _, D = k.shape
    width = max(D, v.shape[3])
    if cu_seqlens is None:
        return plan_dense(B, T, width, chosen, programs, batch_invariant, final)
    if has_states or batch_invariant:
        return plan_packed(cu_seqlens, T, width, chosen, programs, batch_invariant, final)
    return plan_documents(cu_seqlens, T, width, chosen, programs, reverse)


@dispatch.unspecialized(triton.jit)
def documents_kernel(cu_seqlens, begins, ends, N, step, T, BLOCK: tl.constexpr):
    """Where the document of each row begins and ends, [T + 1] each; ``step``: the power of two at or below N, or 0.

    Rows past the last document, and row T, are of one more that ends at T: so begins[T] is how many rows have a
    document. A search in N takes its binary digits: 14 loads, one after another, where there are 9000.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    document = tl.zeros([BLOCK], tl.int32)
    begin = tl.zeros([BLOCK], tl.int32)
    while step > 0:
        ahead = document + step
        there = tl.load(cu_seqlens + ahead, mask=ahead <= N, other=0).to(tl.int32)
        reached = (ahead <= N) & (there <= row)
        document = tl.where(reached, ahead, document)
        begin = tl.where(reached, there, begin)
        step = step // 2
    tl.store(begins + row, begin, mask=row <= T)
    if ends is not None:
        end = tl.load(cu_seqlens + document + 1, mask=document < N, other=0).to(tl.int32)
        tl.store(ends + row, tl.where(document < N, end, T), mask=row <= T)


@triton.jit
def lengths(cu_seqlens, slots, sequence, N, short):
    """First row and number of rows of sequences, a vector, and whether they get segments."""
    real = sequence < N
    start = tl.load(cu_seqlens + sequence, mask=real, other=0).to(tl.int32)
    stop = tl.load(cu_seqlens + sequence + 1, mask=real, other=0).to(tl.int32)
    taken = real & (stop - start > short)
    if slots is not None:
        taken = taken & (tl.load(slots + sequence, mask=real, other=-1) >= 0)
    return start, stop - start, taken


@triton.jit
def segments_of(length, taken, segment_rows, extra):
    """How many segments sequences have, and how many boundary states."""
    count = tl.where(taken, tl.maximum(tl.cdiv(length + extra, segment_rows), 1), 0)
    return count, tl.where(count > 1, count, 0)


@triton.jit
def write_segment(table, index, sequence, begin, end, is_first, is_last, boundary, here):
    row = table + index * 5
    tl.store(row, sequence, mask=here)
    tl.store(row + 1, begin, mask=here)
    tl.store(row + 2, end, mask=here)
    tl.store(row + 3, tl.where(is_first, 1, 0) + tl.where(is_last, 2, 0), mask=here)
    tl.store(row + 4, boundary, mask=here)


@dispatch.unspecialized(triton.jit)
def plan_kernel(cu_seqlens, slots, segment_table, first_boundary, split_sequences, N, segment_rows, segment_count, most,
                short, extra, BLOCK: tl.constexpr):  # fmt: skip
    """Lay out the segments of a packed batch, with no look at the lengths on the host.

    segment_table [segment_count, 5], in the order in which programs are started, long segments first: sequence (-1:
    none), first row, row past the last, 1 · first of its sequence + 2 · last of it, and boundary index, which of the
    boundary states is before it, where its sequence has more than one. first_boundary [N + 1]: the boundary index of
    each sequence's first segment, and the number of boundary states. split_sequences [most]: the sequences that have
    more than one segment, -1 after them. A sequence with no row has one segment with none, which carries its state
    over; with ``extra`` 1 instead of 0 every sequence of whole segments alone has such a one more.
    """
    used = 0
    placed = 0
    split = 0
    for n in range(0, N, BLOCK):
        sequence = n + tl.arange(0, BLOCK)
        start, length, taken = lengths(cu_seqlens, slots, sequence, N, short)
        segments, states = segments_of(length, taken, segment_rows, extra)
        boundary = used + tl.cumsum(states, 0) - states
        tl.store(first_boundary + sequence, boundary, mask=sequence < N)
        full = tl.where(taken, length // segment_rows, 0)
        index = placed + tl.cumsum(full, 0) - full
        for i in range(0, tl.max(full, 0)):
            begin = start + i * segment_rows
            write_segment(segment_table, index + i, sequence, begin, begin + segment_rows, i == 0, i == segments - 1,
                          boundary + i, i < full)  # fmt: skip
        several = (segments > 1).to(tl.int32)
        tl.store(split_sequences + split + tl.cumsum(several, 0) - 1, sequence, mask=several > 0)
        split += tl.sum(several, 0)
        used += tl.sum(states, 0)
        placed += tl.sum(full, 0)
    tl.store(first_boundary + N, used)
    # What is left of each sequence: a quarter of segment_rows rows or more, or fewer.
    upper = segment_rows
    for part in tl.static_range(2):
        lower = 0
        if part == 0:
            lower = tl.cdiv(segment_rows, 4)
        used = 0
        for n in range(0, N, BLOCK):
            sequence = n + tl.arange(0, BLOCK)
            start, length, taken = lengths(cu_seqlens, slots, sequence, N, short)
            segments, states = segments_of(length, taken, segment_rows, extra)
            boundary = used + tl.cumsum(states, 0) - 1
            full = length // segment_rows
            rest = length - full * segment_rows
            here = taken & (segments > full) & (rest >= lower) & (rest < upper)
            index = placed + tl.cumsum(here.to(tl.int32), 0) - 1
            begin = start + full * segment_rows
            write_segment(segment_table, index, sequence, begin, begin + rest, full == 0, full >= 0, boundary, here)
            used += tl.sum(states, 0)
            placed += tl.sum(here.to(tl.int32), 0)
        upper = lower
    for n in range(split, most, BLOCK):
        index = n + tl.arange(0, BLOCK)
        tl.store(split_sequences + index, -1, mask=index < most)
    for n in range(placed, segment_count, BLOCK):
        index = n + tl.arange(0, BLOCK)
        tl.store(segment_table + index * 5, -1, mask=index < segment_count)
