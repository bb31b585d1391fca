"""The recurrence in registers, over states in a pool: a token, drafts that leave no trace, drafts that are accepted.

A program has all D rows of some columns of one head's state, and so needs nobody's help for its part of the output. It
reads the state once, and writes it once or not at all.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import natural_decay, whole_and_rest
from lightning_attention.kernels.triton.work import starts_from_initial


class StateTile(NamedTuple):
    """The part of a state [D, E] that a program has: all rows, padded to ``rows``, and so many ``columns``.

    aligned: whether a state is one piece of memory, whose rows can be read 16 bytes at a time or, where they lie
    ``columns_first``, as [E, D], whose columns can. Where they lie is then known when the kernel is compiled, and takes
    a fifth of a decoding step's instructions less than by their strides. group: heads of v to a head of q and k.
    Kernels get all of this as one constant.
    """

    D: int
    E: int
    rows: int
    columns: int
    aligned: bool
    columns_first: bool
    group: int


class Vectors(NamedTuple):
    """Rows of a tensor [T, H, width]."""

    pointer: tl.tensor
    token_stride: tl.tensor
    head_stride: tl.tensor


class States(NamedTuple):
    """A pool [S, H, D, E]; the sequence's row is that in ``slots``, or its own number."""

    pointer: tl.tensor
    slot_stride: tl.tensor
    head_stride: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor


@triton.jit
def place_of(item, H, TILE: tl.constexpr):
    """Sequence, head and first column of a piece of work; those of one state are neighbours."""
    tiles: tl.constexpr = (TILE.E + TILE.columns - 1) // TILE.columns
    return item // tiles // H, item // tiles % H, item % tiles * TILE.columns


@triton.jit
def place(H, TILE: tl.constexpr):
    """Sequence, head and first column of this program."""
    return place_of(tl.program_id(0), H, TILE)


@triton.jit
def slot_of(slots, n):
    """The row of the pool that is sequence n's, 64 bits wide, for a pool has more than 2^31 elements."""
    if slots is None:
        slot = n.to(tl.int64)
    else:
        slot = tl.load(slots + n).to(tl.int64)
    return slot


@triton.jit
def state_tile(states, slot, head, column, TILE: tl.constexpr):
    """Where a program's part of a state lies, and which of it exists."""
    return columns_at(states, slot, head, column, TILE, TILE.columns)


@triton.jit
def columns_at(states, slot, head, column, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Where some columns of a state lie, and which of them exist."""
    row = tl.arange(0, TILE.rows)
    col = column + tl.arange(0, COLUMNS)
    base = states.pointer + slot * states.slot_stride + head * states.head_stride
    if TILE.aligned and TILE.columns_first:
        where = tl.multiple_of(base + row[:, None] + col[None, :] * TILE.D, [16, 16])
    elif TILE.aligned:
        where = tl.multiple_of(base + row[:, None] * TILE.E + col[None, :], [16, 16])
    else:
        where = base + row[:, None] * states.row_stride + col[None, :] * states.column_stride
    return where, (row < TILE.D)[:, None] & (col < TILE.E)[None, :]


@triton.jit
def load_row(x, start, width, BLOCK: tl.constexpr):
    """``width`` numbers at x in float32, of BLOCK from ``start``; zero past the end."""
    at = start + tl.arange(0, BLOCK)
    return tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)


@triton.jit
def store_row(x, start, width, value, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    tl.store(x + at, value, mask=at < width)


@triton.jit
def zero_row(out, token, head, column, H, TILE: tl.constexpr):
    """Clear a program's part of a token's output."""
    COLUMNS: tl.constexpr = TILE.columns
    store_row(out + (token * H + head) * TILE.E, column, TILE.E, tl.zeros([COLUMNS], tl.float32), COLUMNS)


@triton.jit
def zero_state(TILE: tl.constexpr):
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def whole_row(x, token, head, TILE: tl.constexpr):
    """A token's row of q or k, for a head of v."""
    return load_row(x.pointer + token * x.token_stride + head // TILE.group * x.head_stride, 0, TILE.D, TILE.rows)


@triton.jit
def part_of_row(x, token, head, column, TILE: tl.constexpr):
    """A program's part of a token's row of v."""
    return load_row(x.pointer + token * x.token_stride + head * x.head_stride, column, TILE.E, TILE.columns)


@triton.jit
def decay_of(log_decay, head):
    """The head's decay as a sum of two, 1 or 0 and the rest."""
    whole = 1.0
    rest = 0.0
    if log_decay is not None:
        whole, rest = whole_and_rest(natural_decay(log_decay, head))
    return whole, rest


@triton.jit
def step(state, k, v, whole, rest):
    """λ S + kᵀ v, λ = whole + rest, in fused products and sums: said outright, it rounds the same in every kernel.

    The large term comes last: what decays in one token may be less than a rounding of S, and would be lost by itself.
    """
    k = tl.broadcast_to(k[:, None], state.shape)
    v = tl.broadcast_to(v[None, :], state.shape)
    change = tl.fma(tl.full(state.shape, rest, tl.float32), state, k * v)
    return tl.fma(tl.full(state.shape, whole, tl.float32), state, change)


@triton.jit
def store_output(out, token, head, column, q_row, state, scale, H, TILE: tl.constexpr):
    store_row(out + (token * H + head) * TILE.E, column, TILE.E, tl.sum(q_row[:, None] * state, 0) * scale,
              TILE.columns)  # fmt: skip


@triton.jit
def read_token(state, q, k, v, out, token, head, column, whole, rest, scale, H, TILE: tl.constexpr):
    """The state after a token, whose output is written."""
    k_row = whole_row(k, token, head, TILE)
    v_row = part_of_row(v, token, head, column, TILE)
    q_row = whole_row(q, token, head, TILE)  # not after the step, where it would be waited for
    state = step(state, k_row, v_row, whole, rest)
    store_output(out, token, head, column, q_row, state, scale, H, TILE)
    return state


@dispatch.unspecialized(triton.jit)
def decode_kernel(q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
                  v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64",
                  row_stride: "i64", column_stride: "i64", slots, log_decay, H, scale, clears,
                  TILE: tl.constexpr):  # fmt: skip
    n, head, column = place(H, TILE)
    slot = slot_of(slots, n)
    if slot < 0:
        if clears != 0:
            zero_row(out, n.to(tl.int64), head, column, H, TILE)
        return
    states = States(state, slot_stride, head_stride, row_stride, column_stride)
    where, exists = state_tile(states, slot, head, column, TILE)
    S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    k_row = whole_row(Vectors(k, k_token_stride, k_head_stride), n, head, TILE)
    v_row = part_of_row(Vectors(v, v_token_stride, v_head_stride), n, head, column, TILE)
    q_row = whole_row(Vectors(q, q_token_stride, q_head_stride), n, head, TILE)
    whole, rest = decay_of(log_decay, head)
    S = step(S, k_row, v_row, whole, rest)
    tl.store(where, S, mask=exists)
    store_output(out, n.to(tl.int64), head, column, q_row, S, scale, H, TILE)


@triton.jit
def clear_padding_drafts(out, cu_seqlens, n, N, T, first, last, slot, head, column, H, TILE: tl.constexpr):
    """Zeros for a sequence that is padding, and for its share of the tokens past the last sequence."""
    for t in range(tl.load(cu_seqlens + N).to(tl.int64) + n, T, N):
        zero_row(out, t, head, column, H, TILE)
    if slot < 0:
        for t in range(first, last):
            zero_row(out, t, head, column, H, TILE)


class Snapshots(NamedTuple):
    """Where the states after drafts go: rows of a pool, those of ``slots`` [N, P]; nowhere where it is None."""

    states: States
    slots: tl.tensor
    P: tl.tensor


@triton.jit
def read_drafts(start, queries, keys, values, out, parents, n, first, last, head, column, whole, rest, scale, H,
                snapshots, TILE: tl.constexpr):  # fmt: skip
    """The outputs of drafts that follow a state, and snapshots of the states after them."""
    S = start
    for t in range(first, last):
        if parents is not None:
            up = tl.minimum(tl.load(parents + t).to(tl.int64), t - first - 1)
            if up != t - first - 1:
                # S is another branch's: make the parent's, from it up to the state. That a parent comes earlier is
                # nowhere checked on a GPU, and the walk ends whatever ``parents`` holds.
                S = zero_state(TILE)
                weight = 1.0
                while up >= 0:
                    k_row = whole_row(keys, first + up, head, TILE) * weight
                    v_row = part_of_row(values, first + up, head, column, TILE)
                    S += k_row[:, None] * v_row[None, :]
                    weight = weight * whole + weight * rest
                    up = tl.minimum(tl.load(parents + first + up).to(tl.int64), up - 1)
                S += start * weight
        S = read_token(S, queries, keys, values, out, t, head, column, whole, rest, scale, H, TILE)
        if snapshots.slots is not None:
            # They may go to the pool itself: what the sequence starts from was read before.
            if t - first < snapshots.P:
                to = tl.load(snapshots.slots + n.to(tl.int64) * snapshots.P + t - first).to(tl.int64)
                if to >= 0:
                    whither, exists = state_tile(snapshots.states, to, head, column, TILE)
                    tl.store(whither, S, mask=exists)


@dispatch.unspecialized(triton.jit)
def verify_kernel(q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
                  v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64",
                  row_stride: "i64", column_stride: "i64", slots, log_decay, cu_seqlens, parents, N, T, H, scale,
                  clears, snapshots, to_slot_stride: "i64", to_head_stride: "i64", to_row_stride: "i64",
                  to_column_stride: "i64", snapshot_slots, P, TILE: tl.constexpr):  # fmt: skip
    n, head, column = place(H, TILE)
    first = tl.load(cu_seqlens + n).to(tl.int64)
    last = tl.load(cu_seqlens + n + 1).to(tl.int64)
    slot = slot_of(slots, n)
    if clears != 0:
        clear_padding_drafts(out, cu_seqlens, n, N, T, first, last, slot, head, column, H, TILE)
    if (slot < 0) | (first == last):
        return
    states = States(state, slot_stride, head_stride, row_stride, column_stride)
    where, exists = state_tile(states, slot, head, column, TILE)
    start = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    whole, rest = decay_of(log_decay, head)
    queries = Vectors(q, q_token_stride, q_head_stride)
    keys = Vectors(k, k_token_stride, k_head_stride)
    values = Vectors(v, v_token_stride, v_head_stride)
    to = Snapshots(
        States(snapshots, to_slot_stride, to_head_stride, to_row_stride, to_column_stride), snapshot_slots, P
    )
    read_drafts(start, queries, keys, values, out, parents, n, first, last, head, column, whole, rest, scale, H, to,
                TILE)  # fmt: skip


@triton.jit
def count_accepted(accepted, first, last):
    taken = 0
    for t in range(first, last, 32):
        token = t + tl.arange(0, 32)
        taken += tl.sum(tl.load(accepted + token, mask=token < last, other=0).to(tl.int32), 0)
    return taken


@dispatch.unspecialized(triton.jit)
def commit_kernel(k, k_token_stride: "i64", k_head_stride: "i64", v, v_token_stride: "i64", v_head_stride: "i64", state,
                  slot_stride: "i64", head_stride: "i64", row_stride: "i64", column_stride: "i64", slots, log_decay,
                  cu_seqlens, accepted, H, TILE: tl.constexpr):  # fmt: skip
    n, head, column = place(H, TILE)
    first = tl.load(cu_seqlens + n).to(tl.int64)
    last = tl.load(cu_seqlens + n + 1).to(tl.int64)
    slot = slot_of(slots, n)
    if (slot < 0) | (count_accepted(accepted, first, last) == 0):
        return
    states = States(state, slot_stride, head_stride, row_stride, column_stride)
    where, exists = state_tile(states, slot, head, column, TILE)
    S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    whole, rest = decay_of(log_decay, head)
    keys = Vectors(k, k_token_stride, k_head_stride)
    values = Vectors(v, v_token_stride, v_head_stride)
    for t in range(first, last):
        if tl.load(accepted + t):
            S = step(S, whole_row(keys, t, head, TILE), part_of_row(values, t, head, column, TILE), whole, rest)
    tl.store(where, S, mask=exists)


@dispatch.unspecialized(triton.jit)
def short_kernel(q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
                 v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64",
                 row_stride: "i64", column_stride: "i64", slots, log_decay, cu_seqlens, fresh, H, short, scale,
                 TILE: tl.constexpr):  # fmt: skip
    """The sequences of a packed batch that have at most ``short`` rows; a fresh one of none leaves zero."""
    n, head, column = place(H, TILE)
    first = tl.load(cu_seqlens + n).to(tl.int64)
    last = tl.load(cu_seqlens + n + 1).to(tl.int64)
    slot = slot_of(slots, n)
    from_initial = starts_from_initial(fresh, n)
    if (slot < 0) | (last - first > short) | ((last == first) & from_initial):
        return
    states = States(state, slot_stride, head_stride, row_stride, column_stride)
    where, exists = state_tile(states, slot, head, column, TILE)
    S = zero_state(TILE)
    if from_initial:
        S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    whole, rest = decay_of(log_decay, head)
    queries = Vectors(q, q_token_stride, q_head_stride)
    keys = Vectors(k, k_token_stride, k_head_stride)
    values = Vectors(v, v_token_stride, v_head_stride)
    for t in range(first, last):
        S = read_token(S, queries, keys, values, out, t, head, column, whole, rest, scale, H, TILE)
    tl.store(where, S, mask=exists)
