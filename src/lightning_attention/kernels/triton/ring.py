"""Decode, verify, commit and fold over states with rings of recent tokens, which spare writing the states.

kernels/recent.py says what a ring holds and which heads fold in a step. A program has all D rows of some columns of one
head's state, as in recurrent.py; in ``commit_recent_kernel`` one part after the other. What is read goes by weights of
the tokens; what is folded token by token, which gives a float32 state the bits of having had no ring.

The count of a slot is read by all programs of the slot and written when all have read it, with no launch after this
one: adding ``TICKET`` to it gives each program the count, and how many have read it before; the last one writes. Only
this one number passes between programs, and all see its changes in one order, so no memory barrier is needed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import natural_decay, whole_and_rest
from lightning_attention.kernels.triton.recurrent import (
    Snapshots,
    States,
    Vectors,
    clear_padding_drafts,
    count_accepted,
    decay_of,
    load_row,
    part_of_row,
    place,
    read_drafts,
    slot_of,
    state_tile,
    step,
    store_row,
    whole_row,
    zero_row,
)
from lightning_attention.kernels.triton.work import starts_from_initial

TICKET: tl.constexpr = tl.constexpr(1 << 16)
DRAFTS: tl.constexpr = tl.constexpr(16)  # of a chain, read at once


class RingTile(NamedTuple):
    """A ring's R places, padded to ``rows``, and whether rows of k and of v can be read 16 bytes at a time."""

    places: int
    rows: int
    aligned_k: bool
    aligned_v: bool


class Ring(NamedTuple):
    """A head's keys [R, D] and values [R, E]."""

    k: tl.tensor
    v: tl.tensor


class Held(NamedTuple):
    """What a head holds: of each place how many tokens ago it was filled, and whether it is in use.

    since: tokens since the head's last turn to fold, which may lie before token 0; tokens: how many it holds.
    """

    since: tl.tensor
    tokens: tl.tensor
    age: tl.tensor
    used: tl.tensor


@triton.jit
def take(counts, slot):
    """A slot's count, and this program's ticket."""
    seen = tl.atomic_add(counts + slot, TICKET, sem="relaxed")
    return seen & (TICKET - 1), seen // TICKET


@triton.jit
def give(counts, slot, count, ticket, programs, RING: tl.constexpr):
    """Write a slot's new count, by the last of its programs."""
    after = tl.where(count < 2 * RING.places, count, RING.places + count % RING.places)
    tl.atomic_xchg(counts + slot, after, mask=ticket == programs - 1, sem="relaxed")


@triton.jit
def ring_of(k, k_slot_stride, k_head_stride, v, v_slot_stride, v_head_stride, slot, head):
    return Ring(k + slot * k_slot_stride + head * k_head_stride, v + slot * v_slot_stride + head * v_head_stride)


@triton.jit
def held_by(count, head, H, RING: tl.constexpr):
    since = (count + head * RING.places // H) % RING.places
    tokens = tl.minimum(count, since)
    at = tl.arange(0, RING.rows)
    age = (count - 1 - at + RING.rows * RING.places) % RING.places
    return Held(since, tokens, age, (at < RING.places) & (age < tokens))


@triton.jit
def load_rows(x, stride, at, used, start, width, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Some rows' numbers in float32, BLOCK from ``start``; zero past the end, and where a row is not in use."""
    col = start + tl.arange(0, BLOCK)
    where = x + at[:, None] * stride + col[None, :]
    if ALIGNED:
        where = tl.multiple_of(where, [16, 16])
    return tl.load(where, mask=used[:, None] & (col < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def held_keys(ring, held, TILE: tl.constexpr, RING: tl.constexpr):
    """[R, D]; zero where a place is not in use, for it may hold anything."""
    return load_rows(ring.k, TILE.D, tl.arange(0, RING.rows), held.used, 0, TILE.D, TILE.rows, RING.aligned_k)


@triton.jit
def held_values(ring, column, held, TILE: tl.constexpr, RING: tl.constexpr):
    """A program's part of [R, E]."""
    return load_rows(ring.v, TILE.E, tl.arange(0, RING.rows), held.used, column, TILE.E, TILE.columns, RING.aligned_v)


@triton.jit
def power(x, tokens):
    """λ^tokens as one number, log λ being x."""
    whole, rest = whole_and_rest(x * tokens.to(tl.float32))
    return whole + rest


@triton.jit
def read_rows(q_row, keys, values, x, age):
    """What a query reads of tokens of this age."""
    weight = tl.sum(keys * q_row[None, :], 1) * power(x, age)
    return tl.sum(weight[:, None] * values, 0)


@triton.jit
def token_held(ring, token, column, TILE: tl.constexpr, RING: tl.constexpr):
    """A token's key, and a program's part of its value."""
    at = token % RING.places
    k_row = load_row(ring.k + at * TILE.D, 0, TILE.D, TILE.rows)
    return k_row, load_row(ring.v + at * TILE.E, column, TILE.E, TILE.columns)


@triton.jit
def folded(S, ring, column, count, held, whole, rest, TILE: tl.constexpr, RING: tl.constexpr):
    """A program's part of a state with what the head holds."""
    k_row, v_row = token_held(ring, count - held.tokens, column, TILE, RING)
    for token in range(count - held.tokens, count):
        # On its way while this one is folded; after the last one it is nobody's.
        next_k, next_v = token_held(ring, token + 1, column, TILE, RING)
        S = step(S, k_row, v_row, whole, rest)
        k_row, v_row = next_k, next_v
    return S


@dispatch.unspecialized(triton.jit)
def decode_recent_kernel(
        q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
        v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64",
        row_stride: "i64", column_stride: "i64", slots, log_decay, cu_seqlens, ring_k, ring_k_slot_stride: "i64",
        ring_k_head_stride: "i64", ring_v, ring_v_slot_stride: "i64", ring_v_head_stride: "i64", counts, H, scale,
        clears, TILE: tl.constexpr, RING: tl.constexpr):  # fmt: skip
    """Token n of sequence n or, where they are packed, its first; of those without a slot others see to the output."""
    n, head, column = place(H, TILE)
    slot = slot_of(slots, n)
    token = n.to(tl.int64)
    if cu_seqlens is not None:
        token = tl.load(cu_seqlens + n).to(tl.int64)
    if slot < 0:
        if clears != 0:
            zero_row(out, token, head, column, H, TILE)
        return
    states = States(state, slot_stride, head_stride, row_stride, column_stride)
    where, exists = state_tile(states, slot, head, column, TILE)
    loaded = tl.load(where, mask=exists, other=0.0)
    # While the state is on its way. Before, it would be waited for: all threads meet to get what one of them has read.
    count, ticket = take(counts, slot)
    ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride, ring_v_head_stride, slot,
                   head)  # fmt: skip
    held = held_by(count, head, H, RING)
    keys = held_keys(ring, held, TILE, RING)
    values = held_values(ring, column, held, TILE, RING)
    k_row = whole_row(Vectors(k, k_token_stride, k_head_stride), token, head, TILE)
    v_row = part_of_row(Vectors(v, v_token_stride, v_head_stride), token, head, column, TILE)
    q_row = whole_row(Vectors(q, q_token_stride, q_head_stride), token, head, TILE)
    tiles: tl.constexpr = (TILE.E + TILE.columns - 1) // TILE.columns
    give(counts, slot, count + 1, ticket, H * tiles, RING)

    S = loaded.to(tl.float32)
    # Of the state as it was, whether the head folds now or not.
    x = natural_decay(log_decay, head)
    read = tl.sum(q_row[:, None] * S, 0) * power(x, held.tokens + 1) + tl.sum(q_row * k_row, 0) * v_row
    read += read_rows(q_row, keys, values, x, held.age + 1)
    store_row(out + (token * H + head) * TILE.E, column, TILE.E, read * scale, TILE.columns)

    # All programs of the head read its keys, and one writes. Nobody wants what was in that place: before it gets
    # another token a head holds R − 1 at most.
    at = count % RING.places
    if column == 0:
        store_row(ring.k + at * TILE.D, 0, TILE.D, k_row, TILE.rows)
    store_row(ring.v + at * TILE.E, column, TILE.E, v_row, TILE.columns)
    if held.since == RING.places - 1:
        whole, rest = whole_and_rest(x)
        where, exists = state_tile(states, slot_of(slots, n), head, column, TILE)
        S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
        S = folded(S, ring, column, count, held, whole, rest, TILE, RING)
        tl.store(where, step(S, k_row, v_row, whole, rest), mask=exists)


@dispatch.unspecialized(triton.jit)
def part_kernel(cu_seqlens, slots, fresh, single, rest, N, BLOCK: tl.constexpr):
    """The slots of packed sequences in two: of those that go on by one token, and of the others; -1 elsewhere."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = n < N
    slot = n
    if slots is not None:
        slot = tl.load(slots + n, mask=here, other=-1).to(tl.int32)
    first = tl.load(cu_seqlens + n, mask=here, other=0)
    is_single = tl.load(cu_seqlens + n + 1, mask=here, other=0) - first == 1
    if fresh is not None:
        is_single = is_single & (tl.load(fresh + n, mask=here, other=1) == 0)
    tl.store(single + n, tl.where(is_single, slot, -1), mask=here)
    tl.store(rest + n, tl.where(is_single, -1, slot), mask=here)


@triton.jit
def read_chain(S, ring, column, held, queries, keys, values, out, first, last, head, x, scale, H, TILE: tl.constexpr,
               RING: tl.constexpr):  # fmt: skip
    """The outputs of drafts that follow each other, from a state and its ring as they are."""
    old_keys = held_keys(ring, held, TILE, RING)
    old_values = held_values(ring, column, held, TILE, RING)
    draft_keys = keys.pointer + head // TILE.group * keys.head_stride
    draft_values = values.pointer + head * values.head_stride
    q_row = whole_row(queries, first, head, TILE)
    for t in range(first, last):
        next_row = whole_row(queries, tl.minimum(t + 1, last - 1), head, TILE)  # on its way while this one is read
        depth = t - first + 1
        read = tl.sum(q_row[:, None] * S, 0) * power(x, held.tokens + depth)
        read += read_rows(q_row, old_keys, old_values, x, held.age + depth)
        for block in range(first, t + 1, DRAFTS):
            # Drafts after this one are not loaded: they may be NaN, and it is none of theirs.
            token = block + tl.arange(0, DRAFTS)
            near = token <= t
            new_keys = load_rows(draft_keys, keys.token_stride, token, near, 0, TILE.D, TILE.rows, False)
            new_values = load_rows(draft_values, values.token_stride, token, near, column, TILE.E, TILE.columns, False)
            read += read_rows(q_row, new_keys, new_values, x, tl.where(near, t - token, 0))
        store_row(out + (t * H + head) * TILE.E, column, TILE.E, read * scale, TILE.columns)
        q_row = next_row


@dispatch.unspecialized(triton.jit)
def verify_recent_kernel(
        q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
        v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64",
        row_stride: "i64", column_stride: "i64", slots, log_decay, cu_seqlens, parents, ring_k,
        ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v, ring_v_slot_stride: "i64",
        ring_v_head_stride: "i64", counts, N, T, H, scale, clears, TILE: tl.constexpr, RING: tl.constexpr):  # fmt: skip
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
    S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride, ring_v_head_stride, slot,
                   head)  # fmt: skip
    count = tl.load(counts + slot)
    held = held_by(count, head, H, RING)
    queries = Vectors(q, q_token_stride, q_head_stride)
    keys = Vectors(k, k_token_stride, k_head_stride)
    values = Vectors(v, v_token_stride, v_head_stride)
    x = natural_decay(log_decay, head)
    if parents is None:
        read_chain(S, ring, column, held, queries, keys, values, out, first, last, head, x, scale, H, TILE, RING)
    else:
        whole, rest = whole_and_rest(x)
        S = folded(S, ring, column, count, held, whole, rest, TILE, RING)
        read_drafts(S, queries, keys, values, out, parents, n, first, last, head, column, whole, rest, scale, H,
                    Snapshots(states, None, 0), TILE)  # fmt: skip


@dispatch.unspecialized(triton.jit)
def commit_recent_kernel(
        k, k_token_stride: "i64", k_head_stride: "i64", v, v_token_stride: "i64", v_head_stride: "i64", state,
        slot_stride: "i64", head_stride: "i64", row_stride: "i64", column_stride: "i64", slots, log_decay, cu_seqlens,
        accepted, ring_k, ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v, ring_v_slot_stride: "i64",
        ring_v_head_stride: "i64", counts, H, TILE: tl.constexpr, RING: tl.constexpr):  # fmt: skip
    """A program has all columns of a head's state, part by part.

    What comes after the head's last turn to fold goes to the very places of the tokens that it folds, whose keys are
    read for all columns: a program for other columns might not have read them yet.
    """
    n = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first = tl.load(cu_seqlens + n).to(tl.int64)
    last = tl.load(cu_seqlens + n + 1).to(tl.int64)
    slot = slot_of(slots, n)
    taken = count_accepted(accepted, first, last)
    if (slot < 0) | (taken == 0):
        return
    count, ticket = take(counts, slot)
    give(counts, slot, count + taken, ticket, H, RING)
    ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride, ring_v_head_stride, slot,
                   head)  # fmt: skip
    held = held_by(count, head, H, RING)
    keys = Vectors(k, k_token_stride, k_head_stride)
    values = Vectors(v, v_token_stride, v_head_stride)
    since = held.since + taken
    folds = 0  # how many of the new tokens
    if since >= RING.places:
        folds = taken - since % RING.places
        states = States(state, slot_stride, head_stride, row_stride, column_stride)
        whole, rest = decay_of(log_decay, head)
        for column in range(0, TILE.E, TILE.columns):
            where, exists = state_tile(states, slot, head, column, TILE)
            S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
            S = folded(S, ring, column, count, held, whole, rest, TILE, RING)
            done = 0
            for t in range(first, last):
                if (tl.load(accepted + t) != 0) & (done < folds):
                    S = step(S, whole_row(keys, t, head, TILE), part_of_row(values, t, head, column, TILE), whole, rest)
                    done += 1
            tl.store(where, S, mask=exists)
        tl.debug_barrier()  # all threads have read what is overwritten now
    done = 0
    for t in range(first, last):
        if tl.load(accepted + t) != 0:
            if done >= folds:
                at = (count + done) % RING.places
                store_row(ring.k + at * TILE.D, 0, TILE.D, whole_row(keys, t, head, TILE), TILE.rows)
                for column in range(0, TILE.E, TILE.columns):
                    v_row = part_of_row(values, t, head, column, TILE)
                    store_row(ring.v + at * TILE.E, column, TILE.E, v_row, TILE.columns)
            done += 1


@dispatch.unspecialized(triton.jit)
def fold_kernel(state, slot_stride: "i64", head_stride: "i64", row_stride: "i64", column_stride: "i64", slots, fresh,
                log_decay, ring_k, ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v,
                ring_v_slot_stride: "i64", ring_v_head_stride: "i64", counts, H, TILE: tl.constexpr,
                RING: tl.constexpr):  # fmt: skip
    n, head, column = place(H, TILE)
    slot = slot_of(slots, n)
    if slot < 0:
        return
    count, ticket = take(counts, slot)
    tiles: tl.constexpr = (TILE.E + TILE.columns - 1) // TILE.columns
    give(counts, slot, count * 0, ticket, H * tiles, RING)
    held = held_by(count, head, H, RING)
    if (held.tokens > 0) & starts_from_initial(fresh, n):
        states = States(state, slot_stride, head_stride, row_stride, column_stride)
        where, exists = state_tile(states, slot, head, column, TILE)
        S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
        ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride, ring_v_head_stride,
                       slot, head)  # fmt: skip
        whole, rest = decay_of(log_decay, head)
        tl.store(where, folded(S, ring, column, count, held, whole, rest, TILE, RING), mask=exists)
