"""Which part of the work is a program's: numbers alone, so that Gluon's kernels call the same functions as Triton's."""

import triton
import triton.language as tl


@triton.jit
def segment(table, place, segments, L, T, PACKED: tl.constexpr):
    """What the program's segment is.

    Its sequence (-1: none), its batch row, its rows start … stop, whether it is the first and the last of its sequence,
    and the slot of the state before it.
    """
    if PACKED:
        row = table + place * 5
        sequence = tl.load(row)
        start = tl.load(row + 1)
        stop = tl.load(row + 2)
        ends = tl.load(row + 3)
        slot = tl.load(row + 4)
        batch = 0
    else:
        slot = place
        sequence = slot // segments
        start = (slot % segments) * L
        stop = tl.minimum(start + L, T)
        ends = (start == 0).to(tl.int32) + (stop == T).to(tl.int32) * 2
        batch = sequence
    return sequence, batch, start, stop, (ends & 1) != 0, (ends & 2) != 0, slot


@triton.jit
def reach(rate, L):
    """How many rows, in whole blocks, matter to the state of a segment: the weight of the others is zero in float32."""
    rows = tl.minimum(126.0 / tl.maximum(-rate, 1e-6), L.to(tl.float32)).to(tl.int32)
    return (rows // 64 + 1) * 64


@triton.jit
def segment_or_piece(table, place, segments, L, M, T, PACKED: tl.constexpr, OUTPUT: tl.constexpr):
    """With OUTPUT the program's ``segment``; without, which one its piece of M rows is in.

    Last of what is returned is which of its pieces it is, and of how many. Of a packed batch the first T / L segments
    are taken in pieces: those of L rows are among them.
    """
    index = 0
    pieces = 1
    if not OUTPUT:
        pieces = tl.cdiv(L, M)
        of_segment = place // pieces
        index = place % pieces
        if PACKED:
            rest = place - T // L * pieces
            of_segment = tl.where(rest < 0, of_segment, T // L + rest)
            index = tl.where(rest < 0, index, 0)
        place = of_segment
    sequence, batch, start, stop, is_first, is_last, slot = segment(table, place, segments, L, T, PACKED)
    return sequence, batch, start, stop, is_first, is_last, slot, index, pieces


@triton.jit
def piece_rows(rows, L, M, PACKED: tl.constexpr):
    """Of a segment of so many rows; the last of a packed sequence is one piece, for there may be very many of them."""
    if PACKED:
        M = tl.where(rows < L, L, M)
    return M


@triton.jit
def piece_from_end(start, stop, index, rate, L, M, PACKED: tl.constexpr):
    """Of the rows start … stop of a segment those of a piece that matter to the state after it; maybe none."""
    M = piece_rows(stop - start, L, M, PACKED)
    start = tl.maximum(start, stop - reach(rate, L))
    stop -= index * M
    return tl.maximum(start, stop - M), stop


@triton.jit
def piece_from_start(start, stop, index, rate, L, M, PACKED: tl.constexpr):
    """With time reversed: those that matter to the state before it."""
    M = piece_rows(stop - start, L, M, PACKED)
    stop = tl.minimum(stop, start + reach(rate, L))
    start += index * M
    return start, tl.minimum(stop, start + M)


@triton.jit
def natural_decay(log_decay, head):
    """The head's log λ, 0 where there is none.

    Not below -700, whose exponential is 0: a decay of 0 comes as -inf or as the least float32, and times no rows those
    would be NaN.
    """
    if log_decay is None:
        x = (head * 0).to(tl.float32)
    else:
        x = tl.load(log_decay + head)
        x = tl.where(x < -700.0, -700.0, x)
    return x


@triton.jit
def log2_decay(log_decay, head):
    """The head's decay as a power of two."""
    return natural_decay(log_decay, head) * 1.4426950408889634  # log2 e


@triton.jit
def whole_and_rest(x):
    """e^x for x ≤ 0 as a sum of two, 1 or 0 and the rest.

    A factor near 1 in float32, and more so what a GPU's fast exponential makes of it, is off by up to 2.4e-7; after n
    products one by one that is n times as much, always in one direction. What is left of 1, expm1(x), is not.
    """
    slow = tl.abs(x) < 0.25  # there the series' error is 1e-9 of it
    y = tl.where(slow, x, 0.0)
    near_zero = y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040)))))))
    return tl.where(slow, 1.0, 0.0), tl.where(slow, near_zero, tl.exp2(x * 1.4426950408889634))


@triton.jit
def what_is_lost(rate, tokens):
    """λ^tokens − 1, for one sum of products: S + S (λ^m − 1)."""
    whole, rest = whole_and_rest(rate * tokens * 0.6931471805599453)
    return rest + (whole - 1.0)


@triton.jit
def advance(rate, elapsed, tokens):
    """How a state that is carried lazily gets past a block of so many tokens.

    What is carried is S / λ^elapsed, where ``elapsed`` rows went by since it last was S: until it has decayed to a half
    it is left as it is, and not rounded in every block. That goes wrong in one direction where a decay is slow, by
    6.6e-6 after 4096 rows in blocks of 16, and by 2.6e-8 like this. Returned are the next elapsed and, as
    ``whole_and_rest``, by what to multiply.
    """
    ahead = elapsed + tokens
    whole, rest = whole_and_rest(rate * ahead * 0.6931471805599453)
    halved = rate * ahead < -1.0
    return tl.where(halved, 0, ahead), tl.where(halved, whole, 1.0), tl.where(halved, rest, 0.0)


@triton.jit
def carried_units(rate, scale, HALF: tl.constexpr, REVERSE: tl.constexpr):
    """In which power of two, its exponent, a sweep carries its state, and what weighs c besides powers of λ.

    It is 1, but where time is reversed. There it is λ · scale, which may be next to nothing; columns of float16 (HALF)
    keep their bits all the same.
    """
    unit = 0.0
    weight = 1.0
    if REVERSE:
        weight = scale
        if HALF:
            unit = tl.minimum(tl.maximum(tl.ceil(rate + tl.log2(tl.abs(scale))), -64.0), 64.0)
            weight *= tl.exp2(-unit)
    return unit, weight


@triton.jit
def power_below(x):
    """The power of two at or below each x ≥ 0, and its inverse: float16 holds x times the inverse, whatever x is."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def is_alone(is_first, is_last, SEGMENTED: tl.constexpr, PACKED: tl.constexpr):
    """Whether a segment is all of its sequence; known without looking but where packed sequences are cut."""
    alone = not SEGMENTED
    if SEGMENTED and PACKED:
        alone = is_first & is_last
    return alone


@triton.jit
def of_state(slots, sequence, state_slot):
    """Where a sequence's state begins, in numbers from the first one's."""
    row = sequence
    if slots is not None:
        row = tl.load(slots + sequence)
    return row.to(tl.int64) * state_slot


@triton.jit
def inherits(fresh, sequence):
    """Whether a sequence starts from the state that is there."""
    inherited = True
    if fresh is not None:
        inherited = tl.load(fresh + sequence) == 0
    return inherited


@triton.jit
def snapshot(cu_seqlens, slots, at, to, item, sequence, L):
    """Of a snapshot: its sequence's first row, after how many rows it is, in which segment, and whether to take it."""
    start = tl.load(cu_seqlens + sequence).to(tl.int32)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start
    rows = tl.load(at + item).to(tl.int32)
    wanted = (tl.load(to + item) >= 0) & (rows >= 0) & (rows <= length)
    if slots is not None:
        wanted = wanted & (tl.load(slots + sequence) >= 0)
    return start, rows, tl.maximum(rows - 1, 0) // L, wanted
