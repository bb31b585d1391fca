"""Cutting sequences into segments that are swept at once, and joining the states between them.

Nothing is specialized, which the calls by ``launch.run`` rely on.
"""

import triton
import triton.language as tl

from lightning_attention.kernels.triton.sweep import log2_decay


@triton.jit(do_not_specialize=["cu_seqlens", "N", "L", "slots"])
def plan_kernel(cu_seqlens, table, first, N, L, slots, BLOCK: tl.constexpr):
    """Lay out the segments of a packed batch, with no look at the lengths on the host.

    table [slots, 4]: sequence (-1: none), first row, row past the last, 1 · first of its sequence + 2 · last of it.
    first [N + 1]: the slot of each sequence's first segment, and the number of segments. A sequence with no row has one
    segment with none, which carries its state over.
    """
    used = 0
    for n in range(0, N, BLOCK):
        sequence = n + tl.arange(0, BLOCK)
        real = sequence < N
        start = tl.load(cu_seqlens + sequence, mask=real, other=0).to(tl.int32)
        stop = tl.load(cu_seqlens + sequence + 1, mask=real, other=0).to(tl.int32)
        count = tl.where(real, tl.maximum(tl.cdiv(stop - start, L), 1), 0)
        slot = used + tl.cumsum(count, 0) - count
        tl.store(first + sequence, slot, mask=real)
        for i in range(0, tl.max(count, 0)):
            row = table + (slot + i) * 4
            here = i < count
            begin = start + i * L
            tl.store(row, sequence, mask=here)
            tl.store(row + 1, begin, mask=here)
            tl.store(row + 2, tl.minimum(begin + L, stop), mask=here)
            tl.store(row + 3, tl.where(begin == start, 1, 0) + tl.where(i == count - 1, 2, 0), mask=here)
        used += tl.sum(count, 0)
    tl.store(first + N, used)
    for n in range(used, slots, BLOCK):
        slot = n + tl.arange(0, BLOCK)
        tl.store(table + slot * 4, -1, mask=slot < slots)


@triton.jit(do_not_specialize=["before", "after", "initial", "dfinal", "log_decay", "segments", "L", "T", "H", "SIZE"])
def scan_kernel(before, after, initial, dfinal, log_decay, table, first, segments, L, T, H, SIZE, PACKED: tl.constexpr,
                BEFORE: tl.constexpr, AFTER: tl.constexpr, INITIAL: tl.constexpr, DFINAL: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Turn what each segment leaves by itself into what comes before it (or, backwards in time, after it), in place.

    S_before[s] = λ^len(s−1) S_before[s−1] + own[s−1], and the mirror of it for the gradients. States are [slots, H,
    SIZE]; they differ by one factor a head, so they are scanned as flat numbers.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    col = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = col < SIZE
    rate = log2_decay(log_decay, head)
    begin = sequence * segments
    end = begin + segments
    if PACKED:
        begin = tl.load(first + sequence)
        end = tl.load(first + sequence + 1)
    at = (sequence.to(tl.int64) * H + head) * SIZE + col
    across = tl.exp2(rate * L)
    if BEFORE:
        state = tl.zeros([BLOCK], tl.float32)
        if INITIAL:
            state = tl.load(initial + at, mask=inside)
        for i in range(0, end - begin):
            s = begin + i
            where = before + (s.to(tl.int64) * H + head) * SIZE + col
            own = tl.load(where, mask=inside)  # of the last segment nobody wrote it, and nobody uses it
            tl.store(where, state, mask=inside)
            state = across * state + own
    if AFTER:
        state = tl.zeros([BLOCK], tl.float32)
        if DFINAL:
            state = tl.load(dfinal + at, mask=inside)
        # Only a sequence's last segment can have fewer rows.
        rows = T - (segments - 1) * L
        if PACKED:
            rows = tl.load(table + (end - 1) * 4 + 2) - tl.load(table + (end - 1) * 4 + 1)
        factor = tl.exp2(rate * rows)
        for i in range(0, end - begin):
            s = end - 1 - i
            where = after + (s.to(tl.int64) * H + head) * SIZE + col
            own = tl.load(where, mask=inside)
            tl.store(where, state, mask=inside)
            state = factor * state + own
            factor = across


@triton.jit(do_not_specialize=["x", "y", "z", "cu_seqlens", "N", "T", "x_width", "y_width", "z_width"])
def clear_padding_kernel(x, y, z, cu_seqlens, N, T, x_width, y_width, z_width, ROWS: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """Zero the rows of up to three contiguous [T, width] past the last sequence; most programs have none to do."""
    first = tl.load(cu_seqlens + N).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * ROWS
    if start + ROWS <= first:
        return
    for row in range(tl.maximum(start, first), tl.minimum(start + ROWS, T)):
        for column in range(0, x_width, BLOCK):
            col = column + tl.arange(0, BLOCK)
            tl.store(x + row * x_width + col, 0.0, mask=col < x_width)
        for column in range(0, y_width, BLOCK):
            col = column + tl.arange(0, BLOCK)
            tl.store(y + row * y_width + col, 0.0, mask=col < y_width)
        for column in range(0, z_width, BLOCK):
            col = column + tl.arange(0, BLOCK)
            tl.store(z + row * z_width + col, 0.0, mask=col < z_width)
