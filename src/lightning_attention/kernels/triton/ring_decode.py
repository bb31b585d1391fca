"""Decode over states with rings on NVIDIA chips, in Gluon: what ``decode_recent_kernel`` computes, with fewer waits.

Triton passes each row that it loads through shared memory, to give it the layout of what it is multiplied with: the
threads meet, and no later load starts before. Here a row is loaded as it is used. A warp has 32 columns of a state, or
64 in 16 or 8 bits, and needs no other; each of G groups of its lanes has D / G rows one after another, and
the same part of q and of the ring's keys. States come by way of shared memory, where they wait without taking
registers: so all loads of a program are on their way at once, and three or more programs a multiprocessor.

States in 8 bits meet the query in the tensor cores as whole numbers (``product_with_plane``): in float32 each of their
bytes took three instructions, a permutation, a subtraction and a product, and that was most of a program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import natural_decay, whole_and_rest
from lightning_attention.kernels.triton.recurrent import slot_of
from lightning_attention.kernels.triton.ring import age_at, arrive, count_among, nearly, power, top_bits
from lightning_attention.kernels.triton.ring_planes import (
    MMA,
    PLACES,
    PLAIN,
    copy,
    digits,
    eights,
    fold_planes,
    fours,
    plane_copy,
    plane_layout,
    product_with_plane,
    ring_scores,
)
from lightning_attention.kernels.triton.sweeps.hopper_blocks import barrier

COLUMNS = gl.constexpr(32)  # of a state, that a program of one warp has; in 16 or 8 bits it may be twice as many
FOLDED = gl.constexpr(32)  # rows of a state, at once
DRAFTS = gl.constexpr(16)  # queries that are read for at once, of which decode has one

LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA, 1))  # of float32
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA, 1))
LEFT_HALF = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))  # of 16 bits
RIGHT_HALF = gl.constexpr(gl.DotOperandLayout(1, MMA, 2))


@gluon.constexpr_function
def width_of(dtype):
    """Numbers of a state that a lane has side by side: 16 bytes, and no more than 8."""
    return min(8, 128 // dtype.primitive_bitwidth)


@gluon.constexpr_function
def are_short(state, tokens, ring):
    """Whether all are of one type of 16 bits."""
    return state == tokens == ring and state.primitive_bitwidth == 16


@gluon.constexpr_function
def copies_of(dtype, columns):
    """Copies of a program's part of a state that fit in shared memory: two planes of 32 columns are folded there."""
    return 64 // columns if dtype.primitive_bitwidth == 8 else 1


@gluon.constexpr_function
def tile_layout(rows, width, columns=32):
    """A tile of a state, or of values: each group of lanes has rows one after another."""
    lanes = columns // width
    groups = 32 // lanes
    return gl.BlockedLayout([rows // groups, width], [groups, lanes], [1, 1], [1, 0])


@gluon.constexpr_function
def keys_layout(D, width, columns):
    """A ring's keys [16, D]: a lane has the rows of its group in ``tile_layout`` as its part of D."""
    lanes = columns // width
    dims = D * lanes // 32
    powers = [1 << i for i in range(8)]
    registers = [[0, i] for i in powers if i < dims] + [[i, 0] for i in powers if lanes <= i < 16]
    in_lanes = [[i, 0] for i in powers if i < lanes] + [[0, i] for i in powers if dims <= i < D]
    return gl.DistributedLinearLayout(registers, in_lanes, [], [], [16, D])


@gluon.constexpr_function
def swizzled(dtype, columns=32):
    """Shared memory for a tile of a state, read without conflicts as an operand of a product too."""
    if dtype.primitive_bitwidth == 8:
        return PLAIN
    if dtype.primitive_bitwidth == 32:
        return gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    return gl.SwizzledSharedLayout(8, 64 // columns, columns // 8, [1, 0])


@gluon.jit
def row(x, start, at):
    """Numbers of a row in float32, that are read 16 bytes at a time."""
    return gl.load(gl.multiple_of(x + start + at, 16)).to(gl.float32)


@gluon.jit
def add_product(a, b, c):
    """c + a b as exact as float32, in TF32; a of 16 bits, which TF32 holds, or float32."""
    top = top_bits(b)
    left = a.to(gl.float32)
    if a.dtype == gl.float32:
        left = top_bits(a)
        c = mma_v2(a - left, top, c, input_precision="tf32")
    c = mma_v2(left, b - top, c, input_precision="tf32")
    return mma_v2(left, top, c, input_precision="tf32")


@gluon.jit
def scores(queries, keys, row_stride, at, is_one, D: gl.constexpr):
    """Products of 16 queries with 16 keys, rows ``at`` of ``keys``; 0 where there is none."""
    dims = gl.arange(0, D, layout=gl.SliceLayout(1, RIGHT_HALF))
    where = gl.multiple_of(keys + at[None, :].to(gl.int64) * row_stride + dims[:, None], [16, 16])
    found = gl.load(where, mask=is_one[None, :], other=0.0)
    return mma_v2(queries, found, gl.zeros([DRAFTS, PLACES], gl.float32, layout=MMA))


@dispatch.unspecialized(gluon.jit)
def decode_ring_kernel(
        q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
        v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64", slots,
        log_decay, cu_seqlens, ring_k, ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v,
        ring_v_slot_stride: "i64", ring_v_head_stride: "i64", counts, low, scales, scale_slot_stride: "i64",
        scale_head_stride: "i64", H, scale, clears, TILE: gl.constexpr, RING: gl.constexpr):  # fmt: skip
    """The arguments are those of ``decode_recent_kernel``, of calls that ``nvidia.takes`` is true of."""
    D: gl.constexpr = TILE.D
    E: gl.constexpr = TILE.E
    COLUMNS: gl.constexpr = TILE.columns
    WIDTH: gl.constexpr = width_of(state.dtype.element_ty)
    LAYOUT: gl.constexpr = tile_layout(D, WIDTH, COLUMNS)
    VALUES: gl.constexpr = tile_layout(PLACES, WIDTH, COLUMNS)
    # Where all have 16 bits they meet in the tensor cores, with the query as the first of 16 rows. With a state in 8
    # bits keys are the rows, and the query a column.
    TOKENS: gl.constexpr = q.dtype.element_ty
    IS_SHORT: gl.constexpr = are_short(state.dtype.element_ty, TOKENS, ring_k.dtype.element_ty)
    HAS_EIGHTS: gl.constexpr = low is not None and are_short(TOKENS, TOKENS, ring_k.dtype.element_ty)
    KEYS: gl.constexpr = eights(PLACES, D) if HAS_EIGHTS else keys_layout(D, WIDTH, COLUMNS)
    SHARES: gl.constexpr = gl.BlockedLayout([D // 32], [32], [1], [0]) if low is None else fours(D)
    n = gl.program_id(1)
    head = gl.program_id(0) // (E // COLUMNS)
    column = gl.program_id(0) % (E // COLUMNS) * COLUMNS
    slot = slot_of(slots, n)
    rows = gl.arange(0, D, layout=gl.SliceLayout(1, LAYOUT))
    cols = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    token = n.to(gl.int64)
    if cu_seqlens is not None:
        token = gl.load(cu_seqlens + n).to(gl.int64)
        token = gl.where(slot >= 0, token, 0)  # padding may have none
    q_row = row(q, token * q_token_stride + head // TILE.group * q_head_stride, rows)
    share = gl.arange(0, D, layout=SHARES)
    k_share = row(k, token * k_token_stride + head // TILE.group * k_head_stride, share)
    q_share = row(q, token * q_token_stride + head // TILE.group * q_head_stride, share)
    v_row = row(v, token * v_token_stride + head * v_head_stride, cols)
    out += (token * H + head) * E
    if slot < 0:
        if clears != 0:
            gl.store(out + cols, gl.zeros([COLUMNS], gl.float32, layout=gl.SliceLayout(0, LAYOUT)))
        return
    TYPE: gl.constexpr = state.dtype.element_ty
    COPIES: gl.constexpr = copies_of(TYPE, COLUMNS)
    SHARED: gl.constexpr = swizzled(TYPE, COLUMNS) if low is None else plane_layout(COLUMNS)
    buffer = gl.allocate_shared_memory(TYPE, [COPIES, D, COLUMNS], SHARED)
    shared = buffer.index(0)
    state += slot * slot_stride + head * head_stride
    COPY: gl.constexpr = LAYOUT if low is None else plane_copy(COLUMNS)
    copied_rows = gl.arange(0, D, layout=gl.SliceLayout(1, COPY))
    copied_cols = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, COPY))
    where = gl.multiple_of(state + copied_rows[:, None] * E + copied_cols[None, :], [16, 16])
    if low is None:
        count = count_among(counts, slot, gl.program_id(0))
    x = natural_decay(log_decay, head)
    copy(shared, where)
    async_copy.commit_group()
    if low is not None:
        scales += slot * scale_slot_stride + head * scale_head_stride
        by = gl.load(gl.multiple_of(scales + cols, 16))
    if HAS_EIGHTS:
        QUERY: gl.constexpr = eights(8, D)
        eight = gl.arange(0, 8, layout=gl.SliceLayout(1, QUERY))
        query_dims = gl.arange(0, D, layout=gl.SliceLayout(0, QUERY))
        q += token * q_token_stride + head // TILE.group * q_head_stride
        query = gl.load(gl.multiple_of(q + eight[:, None] * 0 + query_dims[None, :], [16, 16]))
    barrier()  # else the assembler would put half of the copies behind what waits for the ring

    if low is not None:  # or it would wait for the count, which is the same for all lanes, before most of the copies
        count = count_among(counts, slot, gl.program_id(0))
    since = (count + head * RING.places // RING.heads) % RING.places
    tokens = gl.minimum(count, since)
    ring_k += slot * ring_k_slot_stride + head * ring_k_head_stride
    ring_v += slot * ring_v_slot_stride + head * ring_v_head_stride
    KEY_AT: gl.constexpr = gl.SliceLayout(0, RIGHT_HALF) if IS_SHORT else gl.SliceLayout(1, KEYS)
    at = gl.arange(0, PLACES, layout=KEY_AT)
    age = age_at(at, count, RING)
    is_used = (at < RING.places) & (age < tokens)
    if IS_SHORT:
        first = gl.arange(0, DRAFTS, layout=gl.SliceLayout(1, LEFT_HALF))
        parts = gl.arange(0, D, layout=gl.SliceLayout(0, LEFT_HALF))
        q_start = token * q_token_stride + head // TILE.group * q_head_stride
        where_q = gl.multiple_of(q + q_start + first[:, None] * 0 + parts[None, :], [16, 16])
        left = gl.load(where_q, mask=(first == 0)[:, None], other=0.0)
        weight = gl.convert_layout(gl.sum(scores(left, ring_k, D, at, is_used, D), 0), KEY_AT)
    elif not HAS_EIGHTS:
        dims = gl.arange(0, D, layout=gl.SliceLayout(0, KEYS))
        where_k = gl.multiple_of(ring_k + at[:, None] * D + dims[None, :], [16, 16])
        keys = gl.load(where_k, mask=is_used[:, None], other=0.0)
    value_at = gl.arange(0, PLACES, layout=gl.SliceLayout(1, VALUES))
    value_age = age_at(value_at, count, RING)
    is_value = (value_at < RING.places) & (value_age < tokens)
    value_cols = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, VALUES))
    values = gl.load(gl.multiple_of(ring_v + value_at[:, None] * E + value_cols[None, :], [16, 16]),
                     mask=is_value[:, None], other=0.0)  # fmt: skip
    if HAS_EIGHTS:
        barrier()  # else the values would be loaded after what waits for the keys
        dims = gl.arange(0, D, layout=gl.SliceLayout(0, KEYS))
        where_k = gl.multiple_of(ring_k + at[:, None] * D + dims[None, :], [16, 16])
        keys = gl.load(where_k, mask=is_used[:, None], other=0.0)
    # All programs of the head read its keys, and one writes. Nobody wants what was in that place: before it gets
    # another token a head holds R − 1 at most.
    place = count % RING.places
    if column == 0:
        gl.store(gl.multiple_of(ring_k + place * D + share, 16), k_share.to(ring_k.dtype.element_ty))
    gl.store(gl.multiple_of(ring_v + place * E + cols, 16), v_row.to(ring_v.dtype.element_ty))

    if low is not None:
        in_digits, exponent = digits(q_share)
    if HAS_EIGHTS:
        weight = gl.convert_layout(ring_scores(keys, query), gl.SliceLayout(1, KEYS))
    elif not IS_SHORT:
        query = gl.convert_layout(q_row, gl.SliceLayout(0, KEYS), assert_trivial=True)
        weight = gl.sum(keys.to(gl.float32) * query[None, :], 1)
    weight *= nearly(x, gl.where(is_used, age, 0) + 1)
    weight = gl.convert_layout(weight, gl.SliceLayout(1, VALUES))
    read = gl.sum(weight[:, None] * values.to(gl.float32), 0)
    read = gl.convert_layout(read, gl.SliceLayout(0, LAYOUT), assert_trivial=True)
    read += gl.sum(q_share * k_share, 0) * v_row
    if IS_SHORT:
        async_copy.wait_group(0)
        of_state = mma_v2(left, shared.load(RIGHT_HALF), gl.zeros([16, COLUMNS], gl.float32, layout=MMA))
        of_state = gl.convert_layout(gl.sum(of_state, 0), gl.SliceLayout(0, LAYOUT))
    elif low is not None:
        async_copy.wait_group(0)
        of_state = product_with_plane(in_digits, exponent, shared, D, COLUMNS)
        of_state = gl.convert_layout(of_state, gl.SliceLayout(0, LAYOUT)) * by
    else:
        async_copy.wait_group(0)
        of_state = gl.sum(q_row[:, None] * shared.load(LAYOUT).to(gl.float32), 0)
    read += of_state * nearly(x, tokens + 1)
    gl.store(out + cols, (read * scale).to(out.dtype.element_ty))
    barrier()  # all threads have read the count
    arrive(counts, slot, count, gl.program_id(0), H * (E // COLUMNS), RING)

    folds = since == RING.places - 1
    if low is not None:
        if folds:
            low += slot * slot_stride + head * head_stride + column
            k += token * k_token_stride + head // TILE.group * k_head_stride
            v += token * v_token_stride + head * v_head_stride + column
            for start in range(0, COLUMNS, 32):
                fold_planes(state + column + start, low + start, scales + column + start, buffer, k, v + start, ring_k,
                            ring_v + column + start, count, tokens, x, D, E, RING)  # fmt: skip
    elif folds:
        ROWS: gl.constexpr = FOLDED * 32 // COLUMNS
        old = gl.arange(0, PLACES, layout=gl.SliceLayout(1, RIGHT))
        old_age = age_at(old, count, RING)
        is_old = (old < RING.places) & (old_age < tokens)
        old_cols = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, RIGHT))
        old_values = gl.load(ring_v + old[:, None] * E + old_cols[None, :], mask=is_old[:, None], other=0.0)
        old_values = old_values.to(gl.float32) * power(x, gl.where(is_old, old_age, 0) + 1)[:, None]
        token_of = gl.arange(0, PLACES, layout=gl.SliceLayout(0, LEFT))
        is_token = (token_of < RING.places) & (age_at(token_of, count, RING) < tokens)
        old_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LEFT))
        old_keys = ring_k + token_of[None, :] * D + old_rows[:, None]
        part_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
        part_cols = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, MMA))
        k_parts = k + token * k_token_stride + head // TILE.group * k_head_stride + part_rows
        v_part = gl.load(v + token * v_token_stride + head * v_head_stride + part_cols).to(gl.float32)
        whole, rest = whole_and_rest(x * (tokens + 1).to(gl.float32))
        for start in gl.static_range(0, D, ROWS):
            keys_part = gl.load(old_keys + start, mask=is_token[None, :], other=0.0)
            k_part = gl.load(k_parts + start).to(gl.float32)
            part = shared.slice(start, ROWS, dim=0).load(MMA).to(gl.float32)
            part = add_product(keys_part, old_values, part * whole + part * rest)
            part += k_part[:, None] * v_part[None, :]
            whither = gl.multiple_of(state + (start + part_rows)[:, None] * E + part_cols[None, :], [16, 16])
            gl.store(whither, part.to(state.dtype.element_ty))
