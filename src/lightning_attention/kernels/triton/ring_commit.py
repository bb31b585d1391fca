"""Commit over states with rings on NVIDIA chips, in Gluon: what ``commit_recent_kernel`` computes, with fewer waits.

A program has a head of a sequence; each of its warps has 32 columns of the state. Most heads do not fold, and their
programs only copy some rows: so a program takes little room, and what waits in memory waits in many of them. A head
that folds has no more than R tokens to fold, each of which has a place of the ring of its own, or would have: one
product takes up those that are held and those that are new, each read from where it lies, and the state goes through
registers a few rows at a time, four times as many being on their way to shared memory. More than R drafts go R at a
time, through memory.

The rows and columns of a product may stand in any order. Columns stand such that what a lane has of a row of the
product is 16 bytes of the state.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import natural_decay, whole_and_rest
from lightning_attention.kernels.triton.recurrent import slot_of
from lightning_attention.kernels.triton.ring import TICKET, age_at, count_after, give, power, take_ticket
from lightning_attention.kernels.triton.ring_decode import PLACES, add_product, copy, width_of

FOLDED = gl.constexpr(16)  # rows of a state, at once
AHEAD = gl.constexpr(4)  # times as many, on their way to shared memory


@gluon.constexpr_function
def part_layout(E, width):
    """Rows [16, E] of a state in memory: a warp has 32 columns, a lane ``width`` side by side."""
    columns = [1 << i for i in range(10)]
    registers = [[0, i] for i in columns if i < width] + [[0, i] for i in columns if 4 * width <= i < 32] + [[8, 0]]
    lanes = [[0, width], [0, 2 * width], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, i] for i in columns if 32 <= i < E], [], [16, E])


@gluon.constexpr_function
def rows_layout(width, dtype, warps):
    """Rows of a ring, which are copied 16 bytes at a time."""
    numbers = 128 // dtype.primitive_bitwidth
    lanes = min(32, width // numbers)
    return gl.BlockedLayout([1, numbers], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def as_product(part, E: gl.constexpr, WIDTH: gl.constexpr, MMA: gl.constexpr):
    """Rows of a state as a product has them; nothing moves."""
    part = part.reshape([FOLDED, E // 32, 8 // WIDTH, 4, WIDTH // 2, 2]).permute([0, 2, 4, 1, 3, 5])
    return gl.convert_layout(part.reshape([FOLDED, E]), MMA, assert_trivial=True)


@gluon.jit
def as_part(found, E: gl.constexpr, WIDTH: gl.constexpr, PART: gl.constexpr):
    """The reverse."""
    found = found.reshape([FOLDED, 8 // WIDTH, WIDTH // 2, E // 32, 4, 2]).permute([0, 3, 1, 4, 2, 5])
    return gl.convert_layout(found.reshape([FOLDED, E]), PART, assert_trivial=True)


@gluon.jit
def column_of(i, E: gl.constexpr, WIDTH: gl.constexpr):
    """Which column of a state is column i of a product."""
    block = i // (E // 4)
    within = block // (WIDTH // 2) * (4 * WIDTH) + i // 2 % 4 * WIDTH + block % (WIDTH // 2) * 2 + i % 2
    return i // 8 % (E // 32) * 32 + within


@gluon.jit
def ones_of(bits):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], gl.int32, is_pure=True, pack=1)


@gluon.jit
def hidden(x):
    """x, unknown to the compiler: else it would keep registers, for all turns of a loop, of what depends on x."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def accepted_from(accepted, block, last, most: gl.constexpr, LANES: gl.constexpr):
    """Which of at ``most`` so many drafts from ``block`` are accepted, a bit each."""
    i = gl.arange(0, 32, layout=LANES)  # more than there are, for one instruction sums up a whole warp
    is_one = gl.load(accepted + block + i, mask=(i < most) & (block + i < last), other=0) != 0
    return gl.sum(gl.where(is_one, 1 << i, 0), 0)


@gluon.jit
def any_accepted(accepted, bits, last, most: gl.constexpr, LANES: gl.constexpr):
    """Whether a draft is; ``bits``: those of the first ``most``."""
    found = bits
    for block in range(most, last, most):
        found |= accepted_from(accepted, block, last, most, LANES)
    return found != 0


@gluon.jit
def drafts_of(cu_seqlens, slots, n):
    """A sequence's first draft, how many it has, and its row of the pool."""
    first = gl.load(cu_seqlens + n).to(gl.int64)
    length = (gl.load(cu_seqlens + n + 1) - first).to(gl.int32)
    return first, length, slot_of(slots, n)


@gluon.jit
def in_order(bits, LANES: gl.constexpr):
    """Which drafts are accepted, one after the other, in four bits each."""
    i = gl.arange(0, PLACES, layout=LANES)
    before = ones_of(bits & ((1 << i) - 1))
    return gl.sum(gl.where((bits >> i & 1) != 0, i.to(gl.int64) << (4 * before), 0), 0)


@gluon.jit
def draft_of(order, rank):
    """The accepted draft that so many come before."""
    return (order >> (4 * (rank & 15))) & 15


@gluon.jit
def at_of(count, RING: gl.constexpr):
    """The place of the token that so many come before, with a remainder that takes one instruction."""
    return (count.to(gl.uint32) % RING.places).to(gl.int32)


@gluon.jit
def origin(ring, x, token_stride, width: gl.constexpr, place, age, drafts, order):
    """Where the row of a place lies: in the ring or, of the newest ``drafts`` tokens, where the draft lies."""
    is_draft = age < drafts
    draft = draft_of(order, drafts - 1 - age) * token_stride
    return gl.where(is_draft, x, ring) + gl.where(is_draft, draft, place * width)


@gluon.jit
def draft_rows(x, token_stride, block, last, width: gl.constexpr, ROWS: gl.constexpr):
    """Rows of up to 16 drafts from ``block``, whether they are accepted or not."""
    i = gl.arange(0, PLACES, layout=gl.SliceLayout(1, ROWS))
    at = gl.arange(0, width, layout=gl.SliceLayout(0, ROWS))
    where = gl.multiple_of(x + ((block + i) * token_stride)[:, None] + at[None, :], [1, 16])
    return gl.load(where, mask=(block + i < last)[:, None], other=0.0)


@gluon.jit
def append(ring, rows, bits, count, drafts, width: gl.constexpr, RING: gl.constexpr, ROWS: gl.constexpr):
    """Write the accepted of some drafts to their places, but for the first so many, which are folded already."""
    i = gl.arange(0, PLACES, layout=gl.SliceLayout(1, ROWS))
    at = gl.arange(0, width, layout=gl.SliceLayout(0, ROWS))
    rank = ones_of(bits & ((1 << i) - 1))
    place = at_of(count + rank, RING)
    is_kept = ((bits >> i & 1) != 0) & (rank >= drafts)
    gl.store(gl.multiple_of(ring + place[:, None] * width + at[None, :], [1, 16]), rows, mask=is_kept[:, None])


@dispatch.unspecialized(gluon.jit)
def commit_ring_kernel(
        k, k_token_stride: "i64", k_head_stride: "i64", v, v_token_stride: "i64", v_head_stride: "i64", state,
        slot_stride: "i64", head_stride: "i64", slots, log_decay, cu_seqlens, accepted, ring_k,
        ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v, ring_v_slot_stride: "i64",
        ring_v_head_stride: "i64", counts, TILE: gl.constexpr, RING: gl.constexpr):  # fmt: skip
    """Arguments and their meaning are those of ``commit_recent_kernel``, for the calls that recent.py brings here."""
    D: gl.constexpr = TILE.D
    E: gl.constexpr = TILE.E
    WARPS: gl.constexpr = E // 32
    WIDTH: gl.constexpr = width_of(state.dtype.element_ty)
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    KEY_ROWS: gl.constexpr = rows_layout(D, k.dtype.element_ty, WARPS)
    VALUE_ROWS: gl.constexpr = rows_layout(E, v.dtype.element_ty, WARPS)
    PART: gl.constexpr = part_layout(E, WIDTH)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    KEYS: gl.constexpr = gl.DotOperandLayout(0, MMA, 1)
    VALUES: gl.constexpr = gl.DotOperandLayout(1, MMA, 1)
    head = gl.program_id(0)
    n = gl.program_id(1)
    first, length, slot = drafts_of(cu_seqlens, slots, n)
    if (slot < 0) | (length <= 0):
        return
    k += first * k_token_stride + head // TILE.group * k_head_stride
    v += first * v_token_stride + head * v_head_stride
    accepted += first
    count = gl.load(counts + slot) & (TICKET - 1)
    x = natural_decay(log_decay, head)
    bits = accepted_from(accepted, 0, length, RING.places, LANES)
    new_keys = draft_rows(k, k_token_stride, 0, length, D, KEY_ROWS)
    new_values = draft_rows(v, v_token_stride, 0, length, E, VALUE_ROWS)
    if not any_accepted(accepted, bits, length, RING.places, LANES):
        return
    # Rows of a lane's neighbours, which are copied with its own, lie in other banks.
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4 * WIDTH, 1, 2, [1, 0])
    waiting = gl.allocate_shared_memory(state.dtype.element_ty, [AHEAD, FOLDED, E], swizzled)
    lane = gl.arange(0, 32 * WARPS, layout=LANES)
    ticket = take_ticket(counts, slot, lane)

    state += slot * slot_stride + head * head_stride
    ring_k += slot * ring_k_slot_stride + head * ring_k_head_stride
    ring_v += slot * ring_v_slot_stride + head * ring_v_head_stride
    for block in tl.range(0, length, RING.places, disable_licm=True):
        block = hidden(block)  # there is one turn nearly always
        taken = ones_of(bits)
        since = at_of(count + head * RING.places // RING.heads, RING)
        drafts = 0  # that are folded
        if since + taken >= RING.places:
            drafts = RING.places - since
            tokens = gl.minimum(count, since) + drafts
            rows = gl.arange(0, FOLDED, layout=gl.SliceLayout(1, PART))
            cols = gl.arange(0, E, layout=gl.SliceLayout(0, PART))
            where = gl.multiple_of(state + rows[:, None] * E + cols[None, :], [16, 16])
            for i in gl.static_range(AHEAD):
                copy(waiting.index(i), gl.multiple_of(where + i * FOLDED * E, [16, 16]))
                async_copy.commit_group()
            order = in_order(bits, LANES)
            place = gl.arange(0, PLACES, layout=gl.SliceLayout(0, KEYS))
            age = age_at(place, count + drafts, RING)
            is_key = ((place < RING.places) & (age < tokens))[None, :]
            key_rows = gl.arange(0, FOLDED, layout=gl.SliceLayout(1, KEYS))
            keys = origin(ring_k, k + block * k_token_stride, k_token_stride, D, place, age, drafts, order)
            keys = keys[None, :] + key_rows[:, None]
            keys_ahead = gl.load(keys, mask=is_key, other=0.0)
            place = gl.arange(0, PLACES, layout=gl.SliceLayout(1, VALUES))
            age = age_at(place, count + drafts, RING)
            is_value = ((place < RING.places) & (age < tokens))[:, None]
            values = origin(ring_v, v + block * v_token_stride, v_token_stride, E, place, age, drafts, order)
            column = column_of(gl.arange(0, E, layout=gl.SliceLayout(0, VALUES)), E, WIDTH)
            values = gl.load(values[:, None] + column[None, :], mask=is_value, other=0.0).to(gl.float32)
            values *= power(x, age)[:, None]
            whole, rest = whole_and_rest(x * tokens.to(gl.float32))
            for start in gl.static_range(0, D, FOLDED):
                keys_part = keys_ahead
                if start + FOLDED < D:
                    keys_ahead = gl.load(keys + (start + FOLDED), mask=is_key, other=0.0)
                change = add_product(keys_part, values, gl.zeros([FOLDED, E], gl.float32, layout=MMA))
                async_copy.wait_group(AHEAD - 1)
                part = waiting.index(start // FOLDED % AHEAD)
                S = as_product(part.load(PART), E, WIDTH, MMA).to(gl.float32)
                if start + AHEAD * FOLDED < D:
                    copy(part, gl.multiple_of(where + (start + AHEAD * FOLDED) * E, [16, 16]))
                async_copy.commit_group()  # of nothing at the end, for so many are counted
                S = S * whole + (S * rest + change)
                S = as_part(S.to(state.dtype.element_ty), E, WIDTH, PART)
                gl.store(gl.multiple_of(where + start * E, [16, 16]), S)
            new_keys = draft_rows(k, k_token_stride, block, length, D, KEY_ROWS)  # again: they took room
            new_values = draft_rows(v, v_token_stride, block, length, E, VALUE_ROWS)
            tl.debug_barrier()  # all threads have read what is overwritten now
        append(ring_k, new_keys, bits, count, drafts, D, RING, KEY_ROWS)
        append(ring_v, new_values, bits, count, drafts, E, RING, VALUE_ROWS)
        count = count_after(count + taken, RING)
        if block + RING.places < length:
            tl.debug_barrier()  # what was written is read now
            bits = accepted_from(accepted, block + RING.places, length, RING.places, LANES)
            new_keys = draft_rows(k, k_token_stride, block + RING.places, length, D, KEY_ROWS)
            new_values = draft_rows(v, v_token_stride, block + RING.places, length, E, VALUE_ROWS)
    give(counts, slot, count, ticket, RING.heads, lane, RING)
