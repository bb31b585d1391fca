"""Which part of the work is a program's: numbers alone, so that Gluon's kernels call the same functions as Triton's."""

from typing import NamedTuple

import triton
import triton.language as tl


class Shape(NamedTuple):
    """Sizes of a call."""

    T: tl.tensor
    H: tl.tensor
    D: tl.tensor
    E: tl.tensor


class Segmentation(NamedTuple):
    """How sequences are cut into segments, as ``plan.Plan`` has it; no table for a dense batch or for documents."""

    segment_table: tl.tensor
    segments_per_sequence: tl.tensor
    segment_rows: tl.tensor
    begins: tl.tensor
    ends: tl.tensor


class Segment(NamedTuple):
    """Rows start … stop of a sequence (-1: none), and which of the states between segments is before them.

    ``piece`` is which of its ``pieces`` a program has, where it has one alone.
    """

    sequence: tl.tensor
    batch: tl.tensor
    start: tl.tensor
    stop: tl.tensor
    is_first: tl.tensor
    is_last: tl.tensor
    boundary_index: tl.tensor
    piece: tl.tensor
    pieces: tl.tensor


class Pool(NamedTuple):
    """States of sequences: sequence i's in row ``slots[i]``, or i; where ``fresh[i]`` it starts from zero."""

    initial: tl.tensor
    final: tl.tensor
    slot_stride: tl.tensor
    head_stride: tl.tensor
    slots: tl.tensor
    fresh: tl.tensor


@triton.jit
def find_segment(plan, index, T, piece=0, pieces=1):
    """The segment with this index, or with this place in the table."""
    if plan.segment_table is not None:
        row = plan.segment_table + index * 5
        sequence = tl.load(row)
        start = tl.load(row + 1)
        stop = tl.load(row + 2)
        ends = tl.load(row + 3)
        boundary_index = tl.load(row + 4)
        batch = 0
    else:
        boundary_index = index
        sequence = index // plan.segments_per_sequence
        place = index % plan.segments_per_sequence
        start = place * plan.segment_rows
        stop = tl.minimum(start + plan.segment_rows, T)  # the last one may have no rows, after one that stops at T too
        ends = (place == 0).to(tl.int32) + (place + 1 == plan.segments_per_sequence).to(tl.int32) * 2
        batch = sequence
        if plan.begins is not None:
            stop = tl.maximum(tl.minimum(stop, tl.load(plan.begins + T)), start)
    return Segment(sequence, batch, start, stop, (ends & 1) != 0, (ends & 2) != 0, boundary_index, piece, pieces)


@triton.jit
def find_piece(plan, piece_rows, index, T):
    """The segment that this piece is in.

    The first T / segment_rows segments of a packed batch are taken in pieces: those that are full are among them.
    """
    pieces = tl.cdiv(plan.segment_rows, piece_rows)
    segment_index = index // pieces
    piece = index % pieces
    if plan.segment_table is not None:
        rest = index - T // plan.segment_rows * pieces
        segment_index = tl.where(rest < 0, segment_index, T // plan.segment_rows + rest)
        piece = tl.where(rest < 0, piece, 0)
    return find_segment(plan, segment_index, T, piece, pieces)


@triton.jit
def is_whole_sequence(segment, plan, SPLIT: tl.constexpr):
    """Whether a segment is all of its sequence; known without looking but where packed sequences are split."""
    whole = not SPLIT
    if SPLIT and plan.segment_table is not None:
        whole = segment.is_first & segment.is_last
    return whole


@triton.jit
def reach(rate, segment_rows):
    """How many rows, in whole blocks, matter to the state of a segment: the weight of the others is zero in float32."""
    rows = tl.minimum(126.0 / tl.maximum(-rate, 1e-6), segment_rows.to(tl.float32)).to(tl.int32)
    return (rows // 64 + 1) * 64


@triton.jit
def rows_in_a_piece(rows, segment_rows, piece_rows, last_piece_rows):
    """Rows in a piece of a segment of so many rows; only a sequence's last segment has shorter pieces."""
    return tl.where(rows < segment_rows, last_piece_rows, piece_rows)


@triton.jit
def nearest_border(borders, start, stop, REVERSE: tl.constexpr):
    """Where the document begins that is the last in rows start … stop; with time reversed, where the first one ends."""
    row = tl.maximum(stop - 1, start)
    if REVERSE:
        row = start
    return tl.load(borders + row)


@triton.jit
def is_past(border, start, stop, REVERSE: tl.constexpr):
    """Whether a document with this border has rows before rows start … stop; with time reversed, after them."""
    if REVERSE:
        past = border > stop
    else:
        past = border < start
    return past


@triton.jit
def is_within(row, border, REVERSE: tl.constexpr):
    """Whether a row is not before where a document begins; with time reversed, not after where it ends."""
    if REVERSE:
        within = row < border
    else:
        within = row >= border
    return within


@triton.jit
def piece_from_end(segment, rows, reach, begins):
    """The rows of a piece that matter to the state after the segment; maybe none."""
    start = tl.maximum(segment.start, segment.stop - reach)
    if begins is not None:
        start = tl.maximum(start, nearest_border(begins, segment.start, segment.stop, False))
    stop = segment.stop - segment.piece * rows
    return tl.maximum(start, stop - rows), stop


@triton.jit
def piece_from_start(segment, rows, reach, ends):
    """The same with time reversed: the rows that matter to the state before the segment."""
    stop = tl.minimum(segment.stop, segment.start + reach)
    if ends is not None:
        stop = tl.minimum(stop, nearest_border(ends, segment.start, segment.stop, True))
    start = segment.start + segment.piece * rows
    return start, tl.minimum(stop, start + rows)


@triton.jit
def state_offset(slots, sequence, slot_stride, head, head_stride):
    """Where the state of a sequence's head begins, in numbers from the first one's."""
    row = sequence
    if slots is not None:
        row = tl.load(slots + sequence)
    return row.to(tl.int64) * slot_stride + head * head_stride


@triton.jit
def starts_from_initial(fresh, sequence):
    """Whether a sequence starts from the state that is there."""
    initial = True
    if fresh is not None:
        initial = tl.load(fresh + sequence) == 0
    return initial


@triton.jit
def find_snapshot(cu_seqlens, slots, first_boundary, snapshot_at, snapshot_slots, index, sequence, segment_rows):
    """Its sequence's first row, after how many rows it is, in which segment, and whether to take it.

    Between two segments it is in the second, after none of its rows: the state that the scan has made.
    """
    start = tl.load(cu_seqlens + sequence).to(tl.int32)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start
    rows = tl.load(snapshot_at + index).to(tl.int32)
    wanted = (tl.load(snapshot_slots + index) >= 0) & (rows >= 0) & (rows <= length)
    if slots is not None:
        wanted = wanted & (tl.load(slots + sequence) >= 0)
    segments = tl.load(first_boundary + sequence + 1) - tl.load(first_boundary + sequence)  # 0 where there is one
    return start, rows, tl.minimum(rows // segment_rows, tl.maximum(segments - 1, 0)), wanted
