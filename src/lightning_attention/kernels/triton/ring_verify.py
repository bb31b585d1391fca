"""Chains of drafts after states with rings on NVIDIA chips, in Gluon: what ``verify_recent_kernel`` computes.

As in ``ring_decode.py`` a program is a warp with 32 columns of a state, which waits in shared memory. Up to 16 drafts
of a sequence are the rows of a product with the state, and of others with keys and values, the ring's and their own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import natural_decay
from lightning_attention.kernels.triton.recurrent import slot_of
from lightning_attention.kernels.triton.ring import age_at, count_of, nearly, top_bits
from lightning_attention.kernels.triton.ring_decode import (
    COLUMNS,
    DRAFTS,
    FOLDED,
    LEFT,
    LEFT_HALF,
    MMA,
    PLACES,
    RIGHT,
    RIGHT_HALF,
    add_product,
    barrier,
    copy,
    scores,
    swizzled,
    tile_layout,
    width_of,
)
from lightning_attention.kernels.triton.ring_planes import numbers

#: A part [32, 32] of a state in 8 bits: a lane has 4 columns side by side, that are 8 apart in the product.
FOURS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [4, 0], [8, 0], [16, 0]], [[1, 0], [2, 0], [0, 4], [0, 8], [0, 16]], [], [], [32, 32]
    )
)


@gluon.jit
def rows_of(values, row_stride, at, is_one, column):
    """Columns of 16 rows of values in float32; 0 where there is none."""
    cols = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, RIGHT))
    where = values + at[:, None].to(gl.int64) * row_stride + cols[None, :]
    return gl.load(where, mask=is_one[:, None], other=0.0).to(gl.float32)


@gluon.jit
def add_weighted(weights, values, read):
    """read + weights · values, the values of 16 bits each."""
    weights = gl.convert_layout(weights, LEFT)
    top = top_bits(weights)
    read = mma_v2(weights - top, values, read, input_precision="tf32")
    return mma_v2(top, values, read, input_precision="tf32")


@gluon.jit
def clear(out, first, last, step, H, E: gl.constexpr):
    """Zeros for some tokens' outputs, 32 columns of one head."""
    cols = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([1], [32], [1], [0]))
    nothing = gl.zeros([COLUMNS], gl.float32, layout=gl.BlockedLayout([1], [32], [1], [0]))
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
    n = gl.program_id(1)
    head = gl.program_id(0) // (E // COLUMNS)
    column = gl.program_id(0) % (E // COLUMNS) * COLUMNS
    first = gl.load(cu_seqlens + n).to(gl.int64)
    last = gl.load(cu_seqlens + n + 1).to(gl.int64)
    length = (last - first).to(gl.int32)
    slot = slot_of(slots, n)
    out += head * E + column
    if (slot < 0) | (length <= 0):
        if clears != 0:
            clear(out, first, last, 1, H, E)
            clear(out, gl.load(cu_seqlens + N).to(gl.int64) + n, T, N, H, E)
        return
    q += first * q_token_stride + head // TILE.group * q_head_stride
    k += first * k_token_stride + head // TILE.group * k_head_stride
    v += first * v_token_stride + head * v_head_stride + column
    count = count_of(counts, slot)
    x = natural_decay(log_decay, head)
    TYPE: gl.constexpr = state.dtype.element_ty
    shared = gl.allocate_shared_memory(TYPE, [D, COLUMNS], swizzled(TYPE))
    LAYOUT: gl.constexpr = tile_layout(D, width_of(TYPE))
    rows = gl.arange(0, D, layout=gl.SliceLayout(1, LAYOUT))
    cols = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    where = state + slot * slot_stride + head * head_stride + rows[:, None] * E + cols[None, :]
    copy(shared, gl.multiple_of(where, [16, 16]))
    async_copy.commit_group()
    if low is not None:
        scales += slot * scale_slot_stride + head * scale_head_stride + column
        by = gl.load(scales + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, MMA)))
    barrier()  # else the assembler would put half of the copies behind what waits for the ring

    if clears != 0:
        clear(out, gl.load(cu_seqlens + N).to(gl.int64) + n, T, N, H, E)
    out += first * H * E
    since = (count + head * RING.places // RING.heads) % RING.places
    tokens = gl.minimum(count, since)
    ring_k += slot * ring_k_slot_stride + head * ring_k_head_stride
    ring_v += slot * ring_v_slot_stride + head * ring_v_head_stride
    key_at = gl.arange(0, PLACES, layout=gl.SliceLayout(0, RIGHT_HALF))
    key_age = age_at(key_at, count, RING)
    value_at = gl.arange(0, PLACES, layout=gl.SliceLayout(1, RIGHT))
    value_age = age_at(value_at, count, RING)
    score_at = gl.arange(0, PLACES, layout=gl.SliceLayout(0, MMA))
    age = age_at(score_at, count, RING)
    by_age = nearly(x, gl.where((score_at < RING.places) & (age < tokens), age, 0))
    old_values = rows_of(ring_v, E, value_at, (value_at < RING.places) & (value_age < tokens), column)
    key_used = (key_at < RING.places) & (key_age < tokens)

    QUERIES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    query_shared = gl.allocate_shared_memory(q.dtype.element_ty, [DRAFTS, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    for block in range(0, length, DRAFTS):
        query_token = block + gl.arange(0, DRAFTS, layout=gl.SliceLayout(1, QUERIES))
        query_dims = gl.arange(0, D, layout=gl.SliceLayout(0, QUERIES))
        where_q = gl.multiple_of(q + query_token[:, None].to(gl.int64) * q_token_stride + query_dims[None, :], [16, 16])
        query_shared.store(gl.load(where_q, mask=(query_token < length)[:, None], other=0.0))
        queries = query_shared.load(LEFT_HALF)
        token = block + gl.arange(0, DRAFTS, layout=gl.SliceLayout(1, MMA))
        depth = token + 1
        # What is read of the ring and of drafts, while the state is on its way.
        read = gl.zeros([DRAFTS, COLUMNS], gl.float32, layout=MMA)
        weights = scores(queries, ring_k, D, key_at, key_used, D) * by_age[None, :]
        read = add_weighted(weights, old_values, read) * nearly(x, depth)[:, None]
        for before in range(0, block + 1, DRAFTS):
            new_key = before + gl.arange(0, PLACES, layout=gl.SliceLayout(0, RIGHT_HALF))
            new_value = before + gl.arange(0, PLACES, layout=gl.SliceLayout(1, RIGHT))
            draft = before + gl.arange(0, PLACES, layout=gl.SliceLayout(0, MMA))
            new_values = rows_of(v, v_token_stride, new_value, new_value < length, 0)
            sees = draft[None, :] <= token[:, None]
            ahead = gl.where(sees, token[:, None] - draft[None, :], 0)
            weights = scores(queries, k, k_token_stride, new_key, new_key < length, D)
            weights = gl.where(sees, weights * nearly(x, ahead), 0.0)
            # A NaN times a weight of 0 would be NaN in the drafts before it: who sees one is told by a product of
            # ones and zeros.
            is_finite = gl.abs(new_values) < float("inf")
            read = add_weighted(weights, gl.where(is_finite, new_values, 0.0), read)
            seen = gl.convert_layout(gl.where(sees, 1.0, 0.0), LEFT)
            spoilt = gl.zeros([DRAFTS, COLUMNS], gl.float32, layout=MMA)
            spoilt = mma_v2(seen, gl.where(is_finite, 0.0, 1.0), spoilt, input_precision="tf32")
            read = gl.where(spoilt > 0.0, float("nan"), read)
        async_copy.wait_group(0)
        of_state = gl.zeros([DRAFTS, COLUMNS], gl.float32, layout=MMA)
        if low is not None:
            for start in gl.static_range(0, D, FOLDED):
                part = numbers(shared.slice(start, FOLDED, dim=0).load(FOURS))
                part = part.reshape([FOLDED, 8, 4]).permute([0, 2, 1]).reshape([FOLDED, COLUMNS])
                part = gl.convert_layout(part, RIGHT, assert_trivial=True)
                query = query_shared.slice(start, FOLDED, dim=1).load(LEFT).to(gl.float32)
                of_state = mma_v2(query, part, of_state, input_precision="tf32")
            of_state = of_state.reshape([DRAFTS, 4, 8]).permute([0, 2, 1]).reshape([DRAFTS, COLUMNS])
            of_state = gl.convert_layout(of_state, MMA) * by[None, :]
        elif q.dtype.element_ty == TYPE:
            of_state = mma_v2(queries, shared.load(RIGHT_HALF), of_state)
        else:
            for start in gl.static_range(0, D, FOLDED):
                part = shared.slice(start, FOLDED, dim=0).load(RIGHT).to(gl.float32)
                of_state = add_product(query_shared.slice(start, FOLDED, dim=1).load(LEFT), part, of_state)
        read += of_state * nearly(x, tokens + depth)[:, None]
        out_cols = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, MMA))
        where_out = out + token[:, None].to(gl.int64) * (H * E) + out_cols[None, :]
        gl.store(where_out, (read * scale).to(out.dtype.element_ty), mask=(token < length)[:, None])
