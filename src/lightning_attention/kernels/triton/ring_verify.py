"""Chains of drafts on NVIDIA chips, in Gluon: what ``verify_recent_kernel`` and ``verify_kernel`` compute.

As in ``ring_decode.py`` a program is a warp with some columns of a state, which waits in shared memory. Tensor cores
multiply 16 rows with 8 columns. Columns of a state are more than drafts of a sequence, so these are the 8: what is read
is computed transposed, [columns, drafts]. In scores, [drafts, keys], drafts are the first 8 rows of 16, for such a
result is in the lanes that want it as the right operand of the product with values. More than 8 drafts go 8 at a time.

Rows, columns and what is summed over may stand in any order in a product. They stand such that a lane reads 16 bytes of
queries and keys at once, and that registers are filled in the order in which they are multiplied: nothing is passed
between lanes, and next to nothing moved.

Loads wait for each other three times: cuts and the slot, then the state, the count and queries, then keys and values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import natural_decay
from lightning_attention.kernels.triton.recurrent import slot_of
from lightning_attention.kernels.triton.ring import age_at, count_of, nearly, top_bits
from lightning_attention.kernels.triton.ring_decode import (
    LEFT,
    LEFT_HALF,
    MMA,
    PLACES,
    RIGHT,
    RIGHT_HALF,
    barrier,
    copy,
    swizzled,
    tile_layout,
    width_of,
)
from lightning_attention.kernels.triton.ring_planes import numbers

DRAFTS = gl.constexpr(8)  # of a sequence, that are read for at once, and as many that are read
DIMS = gl.constexpr(32)  # of queries and keys, and rows of a state, at once


@gluon.constexpr_function
def rows_layout(rows):
    """8 or 16 rows of queries or keys, 32 numbers of each: a lane has 8 side by side."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[8, 0]] * (rows == 16)
    return gl.DistributedLinearLayout(registers, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [], [], [rows, 32])


@gluon.constexpr_function
def column_bases(columns, bits):
    """Which columns a lane has of a state of so many bits, and by which lanes differ.

    As they are read from shared memory: in 8 bits 4 side by side; in 32 bits 2, which two registers of an operand want
    side by side; in 16 bits 8 apart, as ldmatrix gives them. The first two are in a product's same 16 rows.
    """
    lanes = {8: [4, 8, 16], 16: [1, 2, 4], 32: [2, 4, 8]}[bits]
    return [i for i in (1, 2, 4, 8, 16, 32) if i < columns and i not in lanes], lanes


@gluon.constexpr_function
def values_layout(rows, columns, bits):
    """8 or 16 rows of values: a lane has those whose weights it has."""
    mine, lanes = column_bases(columns, bits)
    registers = [[0, i] for i in mine] + [[1, 0]] + [[8, 0]] * (rows == 16)
    return gl.DistributedLinearLayout(registers, [[2, 0], [4, 0]] + [[0, i] for i in lanes], [], [], [rows, columns])


@gluon.constexpr_function
def state_layout(columns, bits):
    """Rows of a state in shared memory, where they stand as ``row_of`` says."""
    mine, lanes = column_bases(columns, bits)
    registers = [[0, i] for i in mine] + [[4, 0], [8, 0], [16, 0]]
    return gl.DistributedLinearLayout(registers, [[1, 0], [2, 0]] + [[0, i] for i in lanes], [], [], [32, columns])


@gluon.constexpr_function
def read_layout(columns, bits):
    """What is read, [drafts, columns]."""
    mine, lanes = column_bases(columns, bits)
    registers = [[0, i] for i in mine] + [[1, 0]]
    return gl.DistributedLinearLayout(registers, [[2, 0], [4, 0]] + [[0, i] for i in lanes], [], [], [8, columns])


@gluon.constexpr_function
def shared_layout(dtype, columns):
    """Shared memory for a tile of a state, from which ``state_layout`` is read without conflicts."""
    if dtype.primitive_bitwidth == 8 and columns == 64:
        return gl.SwizzledSharedLayout(32, 2, 2, [1, 0])
    return swizzled(dtype, columns)


@gluon.jit
def as_rows(x, BITS: gl.constexpr):
    """Columns [rows, columns] as rows of a product, [columns, rows], in the order in which lanes have them."""
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = x.shape[1]
    if BITS == 8:
        x = x.reshape([rows, columns // 32, 8, 2, 2]).permute([1, 3, 4, 2, 0])
    elif BITS == 32:
        x = x.reshape([rows, columns // 16, 8, 2]).permute([1, 3, 2, 0])
    else:
        x = x.permute([1, 0])
    return x.reshape([columns, rows])


@gluon.jit
def as_columns(x, BITS: gl.constexpr):
    """The reverse."""
    columns: gl.constexpr = x.shape[0]
    rows: gl.constexpr = x.shape[1]
    if BITS == 8:
        x = x.reshape([columns // 32, 2, 2, 8, rows]).permute([4, 0, 3, 1, 2])
    elif BITS == 32:
        x = x.reshape([columns // 16, 2, 8, rows]).permute([3, 0, 2, 1])
    else:
        x = x.permute([1, 0])
    return gl.convert_layout(x.reshape([rows, columns]), read_layout(columns, BITS), assert_trivial=True)


@gluon.jit
def row_of(i, IS_SHORT: gl.constexpr):
    """Which row of a state is row i in shared memory: products sum over them in this order.

    A lane has 8 numbers of a query side by side, which are so many of an operand's rows.
    """
    if IS_SHORT:
        within = i // 2 % 4 * 8 + i // 8 % 4 * 2 + i % 2
    else:
        within = i % 4 * 8 + i // 4 % 8
    return i // DIMS * DIMS + within


@gluon.jit
def halves(x):
    """32 numbers of queries or keys in 16 bits, in the order of ``row_of``."""
    rows: gl.constexpr = x.shape[0]
    return x.reshape([rows, 4, 4, 2]).permute([0, 2, 1, 3]).reshape([rows, DIMS])


@gluon.jit
def fulls(x):
    """32 numbers of queries in float32, likewise, as a product's right operand."""
    rows: gl.constexpr = x.shape[0]
    x = x.reshape([rows, 4, 8]).permute([2, 1, 0]).reshape([DIMS, rows])
    return gl.convert_layout(x, RIGHT, assert_trivial=True).to(gl.float32)


@gluon.jit
def load_rows(x, starts, is_one, D: gl.constexpr):
    """Rows of queries or keys, in parts of 32 numbers; 0 where there is none."""
    dims = gl.arange(0, DIMS, layout=gl.SliceLayout(0, rows_layout(starts.shape[0])))
    where = gl.multiple_of(x + (starts[:, None] + dims[None, :]), [16, 16])
    is_one = is_one[:, None]
    parts = (gl.load(where, mask=is_one, other=0.0), gl.load(where + DIMS, mask=is_one, other=0.0))
    if D == 128:
        parts += (
            gl.load(where + 2 * DIMS, mask=is_one, other=0.0), gl.load(where + 3 * DIMS, mask=is_one, other=0.0)
        )  # fmt: skip
    return parts


@gluon.jit
def load_values(x, starts, is_one, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Columns of some rows of values; 0 where there is none."""
    cols = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    where = gl.multiple_of(x + (starts[:, None] + cols[None, :]), [16, 16])
    return gl.load(where, mask=is_one[:, None], other=0.0)


@gluon.jit
def scores(queries, keys, rows: gl.constexpr, D: gl.constexpr):
    """Products of 8 queries, of 16 rows, with some keys."""
    found = gl.zeros([2 * DRAFTS, rows], gl.float32, layout=MMA)
    for i in gl.static_range(D // DIMS):
        query = halves(queries[i])
        query = gl.join(query, gl.zeros_like(query)).permute([2, 0, 1]).reshape([2 * DRAFTS, DIMS])
        left = gl.convert_layout(query, LEFT_HALF, assert_trivial=True)
        right = gl.convert_layout(halves(keys[i]).permute([1, 0]), RIGHT_HALF, assert_trivial=True)
        found = mma_v2(left, right, found)
    return found


@gluon.jit
def in_order(x):
    """What belongs to 8 or 16 tokens, its first dimension, in the order in which a lane has their weights."""
    tokens: gl.constexpr = x.shape[0]
    width: gl.constexpr = x.shape[1]
    return x.reshape([tokens // 8, 4, 2, width]).permute([0, 2, 1, 3]).reshape([tokens, width])


@gluon.jit
def add_both(values, some, others, read):
    """read + values · (some + others), where TF32 holds all of them; as one product, which sums over 16 or more."""
    columns: gl.constexpr = values.shape[0]
    tokens: gl.constexpr = values.shape[1]
    values = gl.join(values, values).permute([0, 2, 1]).reshape([columns, 2 * tokens])
    left = gl.convert_layout(values, LEFT, assert_trivial=True)
    weights = gl.join(some, others).permute([2, 0, 1]).reshape([2, 2, DRAFTS, tokens]).permute([0, 3, 2, 1])
    weights, _ = gl.split(weights)  # the other rows of the product are no drafts
    weights = weights.reshape([2 * tokens, DRAFTS])
    right = gl.convert_layout(in_order(weights), RIGHT, assert_trivial=True)
    return mma_v2(left, right, read, input_precision="tf32")


@gluon.jit
def add_weighted(values, weights, read):
    """read + values · weights, the values of 16 bits each."""
    top = top_bits(weights)
    return add_both(values, weights - top, top, read)


@gluon.jit
def clear(out, first, last, step, H, E: gl.constexpr, COLUMNS: gl.constexpr):
    """Zeros for some tokens' outputs, some columns of one head."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    cols = gl.arange(0, COLUMNS, layout=LAYOUT)
    nothing = gl.zeros([COLUMNS], gl.float32, layout=LAYOUT)
    for t in range(first, last, step):
        gl.store(out + t * H * E + cols, nothing.to(out.dtype.element_ty))


@dispatch.unspecialized(gluon.jit)
def verify_ring_kernel(
        q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
        v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64", slots,
        log_decay, cu_seqlens, ring_k, ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v,
        ring_v_slot_stride: "i64", ring_v_head_stride: "i64", counts, low, scales, scale_slot_stride: "i64",
        scale_head_stride: "i64", N, T, H, scale, clears, TILE: gl.constexpr, RING: gl.constexpr):  # fmt: skip
    D: gl.constexpr = TILE.D
    E: gl.constexpr = TILE.E
    COLUMNS: gl.constexpr = TILE.columns
    TYPE: gl.constexpr = state.dtype.element_ty
    BITS: gl.constexpr = TYPE.primitive_bitwidth
    IS_SHORT: gl.constexpr = q.dtype.element_ty == TYPE
    n = gl.program_id(1)
    head = gl.program_id(0) // (E // COLUMNS)
    column = gl.program_id(0) % (E // COLUMNS) * COLUMNS
    first = gl.load(cu_seqlens + n).to(gl.int64)
    last = gl.load(cu_seqlens + n + 1).to(gl.int64)
    end = gl.load(cu_seqlens + N).to(gl.int64)  # here, where nobody waits for it
    length = (last - first).to(gl.int32)
    slot = slot_of(slots, n)
    out += head * E + column
    if (slot < 0) | (length <= 0):
        if clears != 0:
            clear(out, first, last, 1, H, E, COLUMNS)
            clear(out, end + n, T, N, H, E, COLUMNS)
        return
    q += first * q_token_stride + head // TILE.group * q_head_stride
    k += first * k_token_stride + head // TILE.group * k_head_stride
    v += first * v_token_stride + head * v_head_stride + column
    if counts is not None:
        count = count_of(counts, slot)
    x = natural_decay(log_decay, head)
    shared = gl.allocate_shared_memory(TYPE, [D, COLUMNS], shared_layout(TYPE, COLUMNS))
    LAYOUT: gl.constexpr = tile_layout(D, width_of(TYPE), COLUMNS)
    rows = row_of(gl.arange(0, D, layout=gl.SliceLayout(1, LAYOUT)), IS_SHORT)
    cols = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    where = state + slot * slot_stride + head * head_stride + rows[:, None] * E + cols[None, :]
    copy(shared, gl.multiple_of(where, [16, 16]))
    async_copy.commit_group()
    READ: gl.constexpr = read_layout(COLUMNS, BITS)
    out_cols = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, READ))
    if low is not None:
        by = gl.load(scales + slot * scale_slot_stride + head * scale_head_stride + column + out_cols)
    barrier()  # else the assembler would put half of the copies behind what waits for the ring

    tokens = 0  # that the ring holds
    if counts is not None:
        ring_k += slot * ring_k_slot_stride + head * ring_k_head_stride
        ring_v += slot * ring_v_slot_stride + head * ring_v_head_stride + column
        tokens = gl.minimum(count, (count + head * RING.places // RING.heads) % RING.places)
    OLD_VALUES: gl.constexpr = values_layout(PLACES, COLUMNS, BITS)
    NEW_VALUES: gl.constexpr = values_layout(DRAFTS, COLUMNS, BITS)
    NEW_ROWS: gl.constexpr = gl.SliceLayout(1, rows_layout(DRAFTS))
    for block in range(0, length, DRAFTS):
        query_at = block + gl.arange(0, DRAFTS, layout=NEW_ROWS)
        queries = load_rows(q, query_at.to(gl.int64) * q_token_stride, query_at < length, D)
        if counts is not None:
            place = gl.arange(0, PLACES, layout=gl.SliceLayout(1, rows_layout(PLACES)))
            is_key = (place < RING.places) & (age_at(place, count, RING) < tokens)
            old_keys = load_rows(ring_k, place * D, is_key, D)
            place = gl.arange(0, PLACES, layout=gl.SliceLayout(1, OLD_VALUES))
            is_value = (place < RING.places) & (age_at(place, count, RING) < tokens)
            old_values = load_values(ring_v, place * E, is_value, COLUMNS, OLD_VALUES)
        token = block + gl.arange(0, 2 * DRAFTS, layout=gl.SliceLayout(1, MMA))
        read = gl.zeros([COLUMNS, DRAFTS], gl.float32, layout=MMA)
        for before in range(0, block + 1, DRAFTS):
            new = before + gl.arange(0, DRAFTS, layout=NEW_ROWS)
            new_keys = load_rows(k, new.to(gl.int64) * k_token_stride, new < length, D)
            new = before + gl.arange(0, DRAFTS, layout=gl.SliceLayout(1, NEW_VALUES))
            new_values = load_values(v, new.to(gl.int64) * v_token_stride, new < length, COLUMNS, NEW_VALUES)
            draft = before + gl.arange(0, DRAFTS, layout=gl.SliceLayout(0, MMA))
            sees = draft[None, :] <= token[:, None]
            ahead = gl.where(sees, token[:, None] - draft[None, :], 0)
            weights = gl.where(sees, scores(queries, new_keys, DRAFTS, D) * nearly(x, ahead), 0.0)
            values = as_rows(in_order(new_values).to(gl.float32), BITS)
            # A NaN times a weight of 0 would be NaN in the drafts before it: who sees one is told by a product of
            # ones and zeros, if there is one.
            magnitude = gl.abs(values).to(gl.int32, bitcast=True).reshape([COLUMNS * DRAFTS])
            if gl.max(magnitude, 0) >= 0x7F800000:
                is_finite = gl.abs(values) < float("inf")
                seen = gl.where(sees, 1.0, 0.0)
                spoilt = gl.zeros([COLUMNS, DRAFTS], gl.float32, layout=MMA)
                spoilt = add_both(gl.where(is_finite, 0.0, 1.0), seen, seen, spoilt)
                read = gl.where(spoilt > 0.0, float("nan"), read)
                values = gl.where(is_finite, values, 0.0)
            read = add_weighted(values, weights, read)
        if counts is not None:
            place = gl.arange(0, PLACES, layout=gl.SliceLayout(0, MMA))
            age = age_at(place, count, RING)
            by_age = nearly(x, gl.where((place < RING.places) & (age < tokens), age, 0))
            weights = scores(queries, old_keys, PLACES, D) * by_age[None, :] * nearly(x, token + 1)[:, None]
            read = add_weighted(as_rows(in_order(old_values).to(gl.float32), BITS), weights, read)

        async_copy.wait_group(0)
        of_state = gl.zeros([COLUMNS, DRAFTS], gl.float32, layout=MMA)
        of_rests = gl.zeros([COLUMNS, DRAFTS], gl.float32, layout=MMA)  # by itself, for sums wait for the one before
        for i in gl.static_range(D // DIMS):
            part = shared.slice(i * DIMS, DIMS, dim=0)
            if IS_SHORT:
                right = gl.convert_layout(halves(queries[i]).permute([1, 0]), RIGHT_HALF, assert_trivial=True)
                of_state = mma_v2(part.permute([1, 0]).load(LEFT_HALF), right, of_state)
            else:
                S = part.load(state_layout(COLUMNS, BITS))
                S = (numbers(S) if low is not None else S).to(gl.float32)
                S = gl.convert_layout(as_rows(S, BITS), LEFT, assert_trivial=True)
                right = fulls(queries[i])
                top = S
                if BITS == 32:  # such a number is two of TF32
                    top = top_bits(S)
                    of_rests = mma_v2(S - top, right, of_rests, input_precision="tf32")
                of_state = mma_v2(top, right, of_state, input_precision="tf32")
        if BITS == 32:
            of_state += of_rests
        of_state = as_columns(of_state, BITS)
        if low is not None:
            of_state *= by[None, :]
        out_at = block + gl.arange(0, DRAFTS, layout=gl.SliceLayout(1, READ))
        read = as_columns(read, BITS) + of_state * nearly(x, tokens + out_at + 1)[:, None]
        where_out = gl.multiple_of(out + (first + out_at)[:, None] * (H * E) + out_cols[None, :], [1, 16])
        gl.store(where_out, (read * scale).to(out.dtype.element_ty), mask=(out_at < length)[:, None])
    if clears != 0:
        clear(out, end + n, T, N, H, E, COLUMNS)
