"""What ``ring_decode.py`` and ``ring_verify.py`` do with states in 8 bits: their numbers in float32, and folding them.

A fold goes twice over a state, for what it becomes is too much for a warp's registers: once for the columns' scales.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from lightning_attention.kernels.triton.planes import LARGEST, LEAST, LEVELS, PARTS, ROUNDING, in_planes
from lightning_attention.kernels.triton.ring import age_at, power, top_bits

#: From global to shared memory; called async_copy_global_to_shared before Triton 3.8.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_Shared = gl.shared_memory_descriptor
#: The same shared memory with another shape; public since Triton 3.9.
seen_as = getattr(_Shared, "reinterpret", None) or _Shared._reinterpret

PLACES = gl.constexpr(16)  # of a ring, at most
ROWS = gl.constexpr(16)  # of a state, folded at once
COLUMNS = gl.constexpr(32)
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))

#: A part [16, 32] of a plane: a lane has 8 numbers of 2 rows side by side.
PACKED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [], [], [16, 32]
    )
)

#: 2^23 + 128 + i has i + 128 as its last byte.
NUMBERS = gl.constexpr("""{
    .reg .b32 bytes;
    xor.b32 bytes, $4, 0x80808080;
    prmt.b32 $0, bytes, 0x4B000000, 0x7440;
    prmt.b32 $1, bytes, 0x4B000000, 0x7441;
    prmt.b32 $2, bytes, 0x4B000000, 0x7442;
    prmt.b32 $3, bytes, 0x4B000000, 0x7443;
}""")


#: Four rows of two columns as four rows of the one and of the other.
APART = gl.constexpr("""
    prmt.b32 $0, $2, $3, 0x6420;
    prmt.b32 $1, $2, $3, 0x7531;
""")

#: The three lower bytes of four whole numbers, all of the lowest first.
BYTES = gl.constexpr("""{
    .reg .b32 first, second, third, fourth;
    prmt.b32 first, $3, $4, 0x5140;
    prmt.b32 second, $5, $6, 0x5140;
    prmt.b32 third, $3, $4, 0x6262;
    prmt.b32 fourth, $5, $6, 0x6262;
    prmt.b32 $0, first, second, 0x5410;
    prmt.b32 $1, first, second, 0x7632;
    prmt.b32 $2, third, fourth, 0x5410;
}""")
OFFSET = gl.constexpr(0x808080)  # 128 in each of three bytes, so that all of them are from 0 to 255
DIGITS = gl.constexpr(8)  # columns of a product, of which three and a zero are digits, twice each


@gluon.constexpr_function
def plane_layout(columns, bytes_each=1):
    """Shared memory for a part of a plane, of which 8 rows are read at once, 16 bytes of each."""
    return gl.SwizzledSharedLayout(16 // bytes_each, 128 // columns, columns // 16, [1, 0])


@gluon.constexpr_function
def plane_copy(columns):
    """A part of a plane, 16 bytes in each lane: a copy has as many rows as a warp has room for."""
    return gl.BlockedLayout([1, 16], [512 // columns, columns // 16], [1, 1], [1, 0])


@gluon.constexpr_function
def fours(D):
    """Rows of a state: a lane has those four that it has of a product, 0, 1, 8 and 9 of 16 after one another."""
    lanes = [[2], [4]] + [[i] if i < D else [0] for i in (16, 32, 64)]
    return gl.DistributedLinearLayout([[1], [8]], lanes, [], [], [D])


@gluon.jit
def by_lanes(x):
    """Rows [D, N] of a product, those of ``fours`` after one another."""
    x = x.reshape([x.shape[0] // 16, 2, 4, 2, x.shape[1]]).permute([0, 2, 1, 3, 4])
    return x.reshape([x.shape[0] * 16, x.shape[4]])


@gluon.constexpr_function
def eights(rows, D):
    """16 keys or 8 times a query, [rows, D], of which a lane reads 8 numbers at a time."""
    registers = [[0, i] for i in (1, 2, 4, 32, 64) if i < D] + [[8, 0]] * (rows == 16)
    return gl.DistributedLinearLayout(registers, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [], [], [rows, D])


@gluon.jit
def by_eights(x):
    """Numbers of ``eights`` in the order in which the lanes have them of a product."""
    x = x.reshape([x.shape[0], x.shape[1] // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4])
    return x.reshape([x.shape[0], x.shape[1] * 32])


@gluon.jit
def ring_scores(keys, query):
    """Products [16] of a ring's keys and a query of the same 16 bits, read as ``eights``."""
    keys = gl.convert_layout(by_eights(keys), gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
    query = gl.convert_layout(by_eights(query).permute([1, 0]), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
    found = mma_v2(keys, query, gl.zeros([PLACES, 8], gl.float32, layout=MMA))
    first = gl.arange(0, 8, layout=gl.SliceLayout(0, MMA)) == 0
    return gl.sum(gl.where(first[None, :], found, 0.0), 1)


@gluon.jit
def digits(q):
    """A query [D] in ``fours`` as whole numbers, three digits of 8 bits each, and what the first digits count.

    To 2^-22 of the largest, or to 2^-126: more than what ``high`` has left of a state, also where a few numbers of q
    are far larger than the others. If one is not finite, neither is q · k, and the digits may be any.
    """
    exponent = gl.maximum(gl.max(gl.abs(q).to(gl.int32, bitcast=True), 0) >> 23, 23)
    up = ((275 - exponent) << 23).to(gl.float32, bitcast=True)  # all are less than 2^22 then
    word = (q * up + ROUNDING).to(gl.int32, bitcast=True)
    word = (word + (OFFSET - 0x4B400000)) ^ OFFSET
    first, second, third = gl.inline_asm_elementwise(
        BYTES, "=r,=r,=r,r,r,r,r", [word], dtype=(gl.int8, gl.int8, gl.int8), is_pure=True, pack=4)  # fmt: skip
    nothing = gl.zeros_like(first)
    found = gl.join(gl.join(first, third), gl.join(second, nothing)).reshape([q.shape[0], 4])
    found = by_lanes(gl.join(found, found).reshape([q.shape[0], DIGITS]))
    return gl.convert_layout(found, gl.DotOperandLayout(1, MMA, 4)), exponent - 22  # which are there twice


@gluon.jit
def product_with_plane(found, exponent, plane, D: gl.constexpr, WIDTH: gl.constexpr):
    """Products [WIDTH] of ``digits`` with the columns of a plane in ``plane_layout``, in the tensor cores.

    Columns are the rows of the product, and the digits its columns. 16 bits, two columns, come from shared memory in
    the order of a product of such numbers; four rows of them are two operands of 8 bits.
    """
    pairs = seen_as(plane, gl.int16, [D, WIDTH // 2], plane_layout(WIDTH, 2)).load(gl.DotOperandLayout(1, MMA, 2))
    even, odd = gl.inline_asm_elementwise(
        APART, "=&r,=&r,r,r", [pairs], dtype=(gl.int8, gl.int8), is_pure=True, pack=4)  # fmt: skip
    LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 4], [4 * 64 // WIDTH, WIDTH // 8], [1, 1], [1, 0]))
    even = gl.convert_layout(digits_read(even, found, exponent), LAYOUT)
    odd = gl.convert_layout(digits_read(odd, found, exponent), LAYOUT)
    return gl.join(even, odd).reshape([WIDTH])


@gluon.jit
def digits_read(part, found, exponent):
    """Products of every other column with a query in digits."""
    columns = gl.convert_layout(by_lanes(part).permute([1, 0]), gl.DotOperandLayout(0, MMA, 4), assert_trivial=True)
    each = mma_v2(columns, found, gl.zeros([columns.shape[0], DIGITS], gl.int32, layout=MMA))
    each = gl.sum(each.reshape([columns.shape[0], 4, 2]), 2)
    digit = gl.arange(0, 4, layout=gl.SliceLayout(0, each.type.layout))
    by = gl.where(digit < 3, exponent + 8 * digit, 0) << 23
    return gl.sum(each.to(gl.float32) * by.to(gl.float32, bitcast=True)[None, :], 1)


@gluon.jit
def numbers(plane):
    """Numbers of 8 bits, four side by side in each lane, in float32; conversions would take four times as long."""
    found = gl.inline_asm_elementwise(NUMBERS, "=r,=r,=r,=r,r", [plane], dtype=gl.int32, is_pure=True, pack=4)
    return found.to(gl.float32, bitcast=True) - (2.0**23 + 128.0)


@gluon.jit
def real_column(column):
    """Which column of a part stands in this one of a product, so that a lane has what ``PACKED`` gives it."""
    return column % 2 + column // 8 * 2 + column // 2 % 4 * 8


@gluon.constexpr_function
def operand(index, dtype):
    """The layout of a product's first or second matrix."""
    return gl.DotOperandLayout(index, MMA, 32 // dtype.primitive_bitwidth)


@gluon.jit
def age_of(at, count, RING: gl.constexpr):
    """How many tokens ago places of a ring were filled, the next one's being R; more: there is no such place."""
    return gl.where(at < RING.places, age_at(at, count, RING), PLACES + RING.places)


@gluon.jit
def top_and_rest(x, dtype: gl.constexpr):
    """Two numbers of 16 bits, or such as TF32 holds, for one of float32, which they make up to 2^-17 of it."""
    if dtype == gl.float32:
        top = top_bits(x)
    else:
        top = x.to(dtype)
    return top, (x - top.to(gl.float32)).to(dtype)


@gluon.jit
def part_after(high, low, by, ring_k, k, is_used, is_new, tops, rests, start, D: gl.constexpr):
    """16 rows of 32 columns with the tokens that a head folds; ``by``: the scales, that much later."""
    KEYS: gl.constexpr = operand(0, ring_k.dtype.element_ty)
    rows = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, KEYS))
    at = gl.arange(0, PLACES, layout=gl.SliceLayout(0, KEYS))
    keys = gl.load(ring_k + at[None, :] * D + rows[:, None], mask=is_used[None, :], other=0.0)
    new_keys = gl.load(k + rows).to(ring_k.dtype.element_ty)
    keys = gl.where(is_new[None, :], new_keys[:, None], keys)
    S = gl.zeros([ROWS, COLUMNS], gl.float32, layout=MMA)
    if ring_k.dtype.element_ty == gl.float32:
        keys, key_rests = top_and_rest(keys, gl.float32)
        S = mma_v2(key_rests, tops, S, input_precision="tf32")
    S = mma_v2(keys, rests, S, input_precision="tf32")
    S = mma_v2(keys, tops, S, input_precision="tf32")
    S = S.reshape([ROWS, 4, 4, 2]).permute([0, 2, 1, 3]).reshape([ROWS, COLUMNS])
    S = gl.convert_layout(S, PACKED, assert_trivial=True)
    return S + (numbers(high.load(PACKED)) + numbers(low.load(PACKED)) * (1.0 / PARTS)) * by[None, :]


@gluon.jit
def copy_plane(plane, shared, D: gl.constexpr, E: gl.constexpr):
    """Have 32 columns copied to shared memory."""
    LAYOUT: gl.constexpr = plane_copy(COLUMNS)
    rows = gl.arange(0, D, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    where = gl.multiple_of(plane + rows[:, None] * E + cols[None, :], [16, 16])
    copy(shared, where)


@gluon.jit
def fold_planes(state, low, scale, buffer, k, v, ring_k, ring_v, count, tokens, x, D: gl.constexpr, E: gl.constexpr,
                RING: gl.constexpr):  # fmt: skip
    """Fold 32 columns, at which the pointers but k and ring_k point; ``buffer``: shared, 64 D bytes."""
    copy_plane(state, seen_as(buffer, gl.int8, [2, D, COLUMNS], PLAIN).index(0), D, E)
    copy_plane(low, seen_as(buffer, gl.int8, [2, D, COLUMNS], PLAIN).index(1), D, E)
    async_copy.commit_group()
    parts = seen_as(buffer, gl.int8, [2 * (D // ROWS), ROWS, COLUMNS], PLAIN)
    VALUES: gl.constexpr = operand(1, ring_k.dtype.element_ty)
    at = gl.arange(0, PLACES, layout=gl.SliceLayout(1, VALUES))
    age = age_of(at, count, RING)
    value_cols = real_column(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, VALUES)))
    values = gl.load(ring_v + at[:, None] * E + value_cols[None, :], mask=(age < tokens)[:, None], other=0.0)
    values = values.to(gl.float32) * power(x, gl.where(age < tokens, age, 0) + 1)[:, None]
    values = gl.where((at == count % RING.places)[:, None], gl.load(v + value_cols).to(gl.float32)[None, :], values)
    tops, rests = top_and_rest(values, ring_k.dtype.element_ty)
    key_at = gl.arange(0, PLACES, layout=gl.SliceLayout(0, operand(0, ring_k.dtype.element_ty)))
    is_used, is_new = age_of(key_at, count, RING) < tokens, key_at == count % RING.places
    cols = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, PACKED))
    by = gl.load(scale + cols) * power(x, tokens + 1)
    async_copy.wait_group(0)
    largest = gl.zeros([ROWS, COLUMNS], gl.float32, layout=PACKED)
    for i in range(D // ROWS):
        S = part_after(parts.index(i), parts.index(D // ROWS + i), by, ring_k, k, is_used, is_new, tops, rests,
                       i * ROWS, D)  # fmt: skip
        largest = gl.maximum(largest, gl.abs(S), propagate_nan=tl.PropagateNan.ALL)
    is_finite = gl.min((largest <= LARGEST).to(gl.int32), 0) == 1
    new_by = gl.maximum(gl.max(gl.where(is_finite[None, :], largest, 0.0), 0) / LEVELS, LEAST)
    per = 1.0 / new_by
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, PACKED))
    for i in range(D // ROWS):
        S = part_after(parts.index(i), parts.index(D // ROWS + i), by, ring_k, k, is_used, is_new, tops, rests,
                       i * ROWS, D)  # fmt: skip
        S = gl.where(is_finite[None, :], S, 0.0)
        new_high, new_low = in_planes(S, new_by[None, :], per[None, :])
        at_part = (i * ROWS + rows)[:, None] * E + cols[None, :]
        gl.store(gl.multiple_of(state + at_part, [16, 16]), new_high)
        gl.store(gl.multiple_of(low + at_part, [16, 16]), new_low)
    gl.store(scale + cols, gl.where(is_finite, new_by, float("nan")))
