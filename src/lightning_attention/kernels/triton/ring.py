"""Decode, verify, commit and fold over states with rings of recent tokens, which spare writing the states.

kernels/recent.py says what a ring holds and which heads fold in a step. A program has all D rows of some columns of one
head's state, as in recurrent.py; in ``commit_recent_kernel`` one part after the other. Tokens that wait, and drafts, go
by weights of the decay: those that are folded together as one product of matrices.

The count of a slot is read by all programs of the slot and written when all have read it, with no launch after this
one: each adds ``TICKET`` to it, and the last one, who finds that all others have, writes. Only this one number passes
between programs, and all see its changes in one order, so no memory barrier is needed. Below the tickets the number
stays what it is until then, so it is read long before.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import natural_decay, whole_and_rest
from lightning_attention.kernels.triton.planes import Planes, read_columns, scale_of, write_columns
from lightning_attention.kernels.triton.recurrent import (
    Snapshots,
    States,
    Vectors,
    clear_padding_drafts,
    count_accepted,
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
HALF: tl.constexpr = tl.constexpr(1 << 15)
DRAFTS: tl.constexpr = tl.constexpr(16)  # of a sequence, taken at once
FOLDED: tl.constexpr = tl.constexpr(32)  # columns of a state that are folded at once


class RingTile(NamedTuple):
    """A ring's R places, padded to ``rows``, and whether rows of k and of v can be read 16 bytes at a time.

    precision: that of products of matrices, as exact as float32; threads: of a program; heads: H, by which heads take
    turns.
    """

    places: int
    rows: int
    aligned_k: bool
    aligned_v: bool
    precision: str
    threads: int
    heads: int


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
def count_of(counts, slot):
    """A slot's count, while programs of this launch take their tickets."""
    return tl.load(counts + slot) & (TICKET - 1)


@triton.jit
def count_after(count, RING: tl.constexpr):
    """A count as it is kept: any that are as many past R places say the same."""
    return tl.where(count < 2 * RING.places, count, RING.places + count % RING.places)


@triton.jit
def take_ticket(counts, slot, lane):
    """How many programs of a slot, whose count this one has read, had done so before.

    In the first ``lane`` of as many as there are threads: for a single number, which all threads get, they would wait
    for each other. And what is found is wanted at the end only: it takes as long as a load. The others have addresses
    of their own, for which nothing is done: else the assembler would add up for all lanes, and wait.
    """
    tl.debug_barrier()  # all threads have read it
    return tl.atomic_add(counts + slot + lane, lane * 0 + TICKET, mask=lane == 0, sem="relaxed") // TICKET


@triton.jit
def give(counts, slot, count, ticket, programs, lane, RING: tl.constexpr):
    """Write a slot's next count, by the last of its programs."""
    kept = count_after(count, RING)
    is_last = (lane == 0) & (ticket == programs - 1)
    tl.atomic_xchg(counts + slot + lane * 0, kept + lane * 0, mask=is_last, sem="relaxed")


@triton.jit
def count_among(counts, slot, program):
    """A slot's count for one of the programs of decode, which ``arrive``; the first of them knows that it has not."""
    seen = tl.load(counts + slot)
    return (seen & (TICKET - 1)) - tl.where((seen < 0) & (program > 0), 1, 0)


@triton.jit
def arrive(counts, slot, count, program, programs, RING: tl.constexpr):
    """Count one token more, without a ticket: a wait for what an atomic operation found would be the longest of all.

    The slot's first program adds the token, and half of 2^32; the others together add the other half. So the
    number is whole again when the last of them has, and any of them sees by its sign, before it adds its own part,
    whether the first one has. All threads of the program have read the count before.
    """
    shares = tl.maximum(programs - 1, 1)
    share = tl.where(program == 1, HALF - HALF // shares * (shares - 1), HALF // shares) * TICKET
    first = count_after(count + 1, RING) - count + tl.where(programs > 1, -HALF * TICKET, 0)
    tl.atomic_add(counts + slot, tl.where(program == 0, first, share), sem="relaxed")


@triton.jit
def ring_of(k, k_slot_stride, k_head_stride, v, v_slot_stride, v_head_stride, slot, head):
    return Ring(k + slot * k_slot_stride + head * k_head_stride, v + slot * v_slot_stride + head * v_head_stride)


@triton.jit
def age_at(at, count, RING: tl.constexpr):
    """How many tokens came since a place was filled, of so many appended; unsigned, a remainder is one instruction."""
    ahead = count - 1 - at + RING.rows * RING.places
    return (ahead.to(tl.uint32) % RING.places).to(tl.int32)


@triton.jit
def held_by(count, head, RING: tl.constexpr):
    since = (count + head * RING.places // RING.heads) % RING.places
    tokens = tl.minimum(count, since)
    at = tl.arange(0, RING.rows)
    age = age_at(at, count, RING)
    return Held(since, tokens, age, (at < RING.places) & (age < tokens))


@triton.jit
def load_rows(x, stride, at, used, start, width, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Some rows' numbers, BLOCK from ``start``; zero past the end, and where a row is not in use."""
    col = start + tl.arange(0, BLOCK)
    where = x + at[:, None] * stride + col[None, :]
    if ALIGNED:
        where = tl.multiple_of(where, [16, 16])
    return tl.load(where, mask=used[:, None] & (col < width)[None, :], other=0.0)


@triton.jit
def store_rows(x, width, at, used, start, rows, BLOCK: tl.constexpr):
    """The reverse, where rows are as wide as they lie apart."""
    col = start + tl.arange(0, BLOCK)
    tl.store(x + at[:, None] * width + col[None, :], rows, mask=used[:, None] & (col < width)[None, :])


@triton.jit
def held_keys(ring, held, TILE: tl.constexpr, RING: tl.constexpr):
    """[R, D]; zero where a place is not in use, for it may hold anything."""
    return load_rows(ring.k, TILE.D, tl.arange(0, RING.rows), held.used, 0, TILE.D, TILE.rows, RING.aligned_k)


@triton.jit
def held_values(ring, column, held, TILE: tl.constexpr, COLUMNS: tl.constexpr, RING: tl.constexpr):
    """Some columns of [R, E]."""
    return load_rows(ring.v, TILE.E, tl.arange(0, RING.rows), held.used, column, TILE.E, COLUMNS, RING.aligned_v)


@triton.jit
def power(x, tokens):
    """λ^tokens as one number, log λ being x."""
    whole, rest = whole_and_rest(x * tokens.to(tl.float32))
    return whole + rest


@triton.jit
def nearly(x, tokens):
    """λ^tokens for what is read and not kept: off by up to 2.4e-7 of it, and 20 instructions less than ``power``."""
    return tl.exp2(x * 1.4426950408889634 * tokens.to(tl.float32))


@triton.jit
def read_rows(q_row, keys, values, x, age):
    """What a query reads of tokens of this age."""
    weight = tl.sum(keys.to(tl.float32) * q_row[None, :], 1) * power(x, age)
    return tl.sum(weight[:, None] * values.to(tl.float32), 0)


@triton.jit
def top_bits(x):
    """What TF32 keeps of a float32; twice as many bits are in it and what it leaves."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, RING: tl.constexpr):
    """A product of matrices as exact as float32, of numbers of 16 bits, which TF32 holds, or float32 or both."""
    if RING.precision == "ieee":
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == b.dtype:
        found = tl.dot(a, b, input_precision="tf32x3")  # of numbers of 16 bits it has no meaning
    elif a.dtype == tl.float32 and b.dtype != tl.float32:
        top = top_bits(a)
        found = tl.dot(a - top, b.to(tl.float32), input_precision="tf32")
        found = tl.dot(top, b.to(tl.float32), found, input_precision="tf32")
    else:
        b = b.to(tl.float32)
        top = top_bits(b)
        found = tl.dot(a.to(tl.float32), b - top, input_precision="tf32")
        found = tl.dot(a.to(tl.float32), top, found, input_precision="tf32")
    return found


@triton.jit
def taken_up(S, keys, values, age, tokens, x, RING: tl.constexpr):
    """Some columns of a state after so many tokens; rows of k and v that are zero are none."""
    whole, rest = whole_and_rest(x * tokens.to(tl.float32))
    change = product(tl.trans(keys), values.to(tl.float32) * power(x, age)[:, None], RING)
    change = tl.fma(tl.full(S.shape, rest, tl.float32), S, change)
    return tl.fma(tl.full(S.shape, whole, tl.float32), S, change)


@dispatch.unspecialized(triton.jit)
def decode_recent_kernel(
        q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
        v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64",
        row_stride: "i64", column_stride: "i64", slots, log_decay, cu_seqlens, ring_k, ring_k_slot_stride: "i64",
        ring_k_head_stride: "i64", ring_v, ring_v_slot_stride: "i64", ring_v_head_stride: "i64", counts, low, scales,
        scale_slot_stride: "i64", scale_head_stride: "i64", H, scale, clears, TILE: tl.constexpr,
        RING: tl.constexpr):  # fmt: skip
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
    tiles: tl.constexpr = (TILE.E + TILE.columns - 1) // TILE.columns
    program = tl.program_id(0) % (H * tiles)
    count = count_among(counts, slot, program)
    states = States(state, slot_stride, head_stride, row_stride, column_stride)
    where, exists = state_tile(states, slot, head, column, TILE)
    loaded = tl.load(where, mask=exists, other=0)
    planes = Planes(low, scales, scale_slot_stride, scale_head_stride)
    by = scale_of(planes, slot, head, column, TILE, TILE.columns)
    ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride, ring_v_head_stride, slot,
                   head)  # fmt: skip
    held = held_by(count, head, RING)
    old_keys = held_keys(ring, held, TILE, RING)
    old_values = held_values(ring, column, held, TILE, TILE.columns, RING)
    values = Vectors(v, v_token_stride, v_head_stride)
    k_row = whole_row(Vectors(k, k_token_stride, k_head_stride), token, head, TILE)
    v_row = part_of_row(values, token, head, column, TILE)
    q_row = whole_row(Vectors(q, q_token_stride, q_head_stride), token, head, TILE)
    x = natural_decay(log_decay, head)
    # The state is read as it was, whether the head folds now or not.
    read = tl.sum(q_row[:, None] * loaded.to(tl.float32), 0) * by * power(x, held.tokens + 1)
    read += tl.sum(q_row * k_row, 0) * v_row + read_rows(q_row, old_keys, old_values, x, held.age + 1)
    store_row(out + (token * H + head) * TILE.E, column, TILE.E, read * scale, TILE.columns)

    # All programs of the head read its keys, and one writes. Nobody wants what was in that place: before it gets
    # another token a head holds R − 1 at most.
    at = count % RING.places
    if column == 0:
        store_row(ring.k + at * TILE.D, 0, TILE.D, k_row, TILE.rows)
    store_row(ring.v + at * TILE.E, column, TILE.E, v_row, TILE.columns)
    tl.debug_barrier()
    arrive(counts, slot, count, program, H * tiles, RING)
    if held.since == RING.places - 1:
        whole, rest = whole_and_rest(x)
        PART: tl.constexpr = min(FOLDED, TILE.columns)
        for start in tl.range(column, column + TILE.columns, PART, num_stages=1):
            S = read_columns(states, planes, slot, head, start, TILE, PART)
            old_part = held_values(ring, start, held, TILE, PART, RING)
            S = taken_up(S, old_keys, old_part, held.age, held.tokens, x, RING)
            v_part = load_row(v + token * v_token_stride + head * v_head_stride, start, TILE.E, PART)
            S = step(S, k_row, v_part, whole, rest)
            write_columns(states, planes, slot, head, start, S, TILE, PART)


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
    old_values = held_values(ring, column, held, TILE, TILE.columns, RING)
    q = queries.pointer + head // TILE.group * queries.head_stride
    k = keys.pointer + head // TILE.group * keys.head_stride
    v = values.pointer + head * values.head_stride
    col = column + tl.arange(0, TILE.columns)
    for block in tl.range(first, last, DRAFTS, num_stages=1):
        token = block + tl.arange(0, DRAFTS)
        depth = (token - first + 1).to(tl.int32)
        rows = load_rows(q, queries.token_stride, token, token < last, 0, TILE.D, TILE.rows, False)
        if S.dtype == rows.dtype and S.dtype != tl.float32:
            read = tl.dot(rows, S)
        else:
            # A float32 state's numbers would go through shared memory, in two parts.
            COLUMNS: tl.constexpr = TILE.columns
            read = tl.zeros([DRAFTS, COLUMNS], tl.float32)
            for t in tl.range(block, tl.minimum(block + DRAFTS, last), num_stages=1):
                row = tl.sum(whole_row(queries, t, head, TILE)[:, None] * S, 0)
                read = tl.where((token == t)[:, None], row[None, :], read)
        read *= power(x, held.tokens + depth)[:, None]
        age = tl.where(held.used, held.age, 0)[None, :] + depth[:, None]
        read += product(product(rows, tl.trans(old_keys), RING) * power(x, age), old_values, RING)
        for before in tl.range(first, block + 1, DRAFTS, num_stages=1):
            draft = before + tl.arange(0, DRAFTS)
            new_keys = load_rows(k, keys.token_stride, draft, draft < last, 0, TILE.D, TILE.rows, False)
            new_values = load_rows(v, values.token_stride, draft, draft < last, column, TILE.E, TILE.columns, False)
            sees = draft[None, :] <= token[:, None]
            ahead = tl.where(sees, token[:, None] - draft[None, :], 0).to(tl.int32)
            weights = tl.where(sees, product(rows, tl.trans(new_keys), RING) * power(x, ahead), 0.0)
            # A NaN times a weight of 0 would be NaN in the drafts before it: who sees one is told by a product of
            # ones and zeros.
            is_finite = tl.abs(new_values.to(tl.float32)) < float("inf")
            read += product(weights, tl.where(is_finite, new_values, 0.0), RING)
            spoilt = tl.dot(sees.to(tl.float16), 1.0 - is_finite.to(tl.float16))
            read = tl.where(spoilt > 0.0, float("nan"), read)
        where = out + (token[:, None] * H + head) * TILE.E + col[None, :]
        tl.store(where, read * scale, mask=(token < last)[:, None] & (col < TILE.E)[None, :])


@dispatch.unspecialized(triton.jit)
def verify_recent_kernel(
        q, q_token_stride: "i64", q_head_stride: "i64", k, k_token_stride: "i64", k_head_stride: "i64", v,
        v_token_stride: "i64", v_head_stride: "i64", out, state, slot_stride: "i64", head_stride: "i64",
        row_stride: "i64", column_stride: "i64", slots, log_decay, cu_seqlens, parents, ring_k,
        ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v, ring_v_slot_stride: "i64",
        ring_v_head_stride: "i64", counts, low, scales, scale_slot_stride: "i64", scale_head_stride: "i64", N, T, H,
        scale, clears, TILE: tl.constexpr, RING: tl.constexpr):  # fmt: skip
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
    S = tl.load(where, mask=exists, other=0)
    if low is not None:
        planes = Planes(low, scales, scale_slot_stride, scale_head_stride)
        S = S.to(tl.float32) * scale_of(planes, slot, head, column, TILE, TILE.columns)[None, :]
    ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride, ring_v_head_stride, slot,
                   head)  # fmt: skip
    held = held_by(count_of(counts, slot), head, RING)
    queries = Vectors(q, q_token_stride, q_head_stride)
    keys = Vectors(k, k_token_stride, k_head_stride)
    values = Vectors(v, v_token_stride, v_head_stride)
    x = natural_decay(log_decay, head)
    if parents is None:
        read_chain(S, ring, column, held, queries, keys, values, out, first, last, head, x, scale, H, TILE, RING)
    else:
        whole, rest = whole_and_rest(x)
        old_values = held_values(ring, column, held, TILE, TILE.columns, RING)
        old_keys = held_keys(ring, held, TILE, RING)
        S = taken_up(S.to(tl.float32), old_keys, old_values, held.age, held.tokens, x, RING)
        read_drafts(S, queries, keys, values, out, parents, n, first, last, head, column, whole, rest, scale, H,
                    Snapshots(states, None, 0), TILE)  # fmt: skip


class Accepted(NamedTuple):
    """Some drafts of a sequence: which they are, which of them are accepted, and how many were before each."""

    token: tl.tensor
    is_one: tl.tensor
    rank: tl.tensor


@triton.jit
def accepted_from(accepted, block, last, before):
    """``before``: how many drafts before this block are accepted."""
    token = block + tl.arange(0, DRAFTS)
    is_one = tl.load(accepted + token, mask=token < last, other=0) != 0
    return Accepted(token, is_one, before + tl.cumsum(is_one.to(tl.int32), 0) - 1)


@dispatch.unspecialized(triton.jit)
def commit_recent_kernel(
        k, k_token_stride: "i64", k_head_stride: "i64", v, v_token_stride: "i64", v_head_stride: "i64", state,
        slot_stride: "i64", head_stride: "i64", row_stride: "i64", column_stride: "i64", slots, log_decay, cu_seqlens,
        accepted, ring_k, ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v, ring_v_slot_stride: "i64",
        ring_v_head_stride: "i64", counts, low, scales, scale_slot_stride: "i64", scale_head_stride: "i64", H,
        TILE: tl.constexpr, RING: tl.constexpr):  # fmt: skip
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
    count = count_of(counts, slot)
    lane = tl.arange(0, RING.threads)
    ticket = take_ticket(counts, slot, lane)
    ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride, ring_v_head_stride, slot,
                   head)  # fmt: skip
    held = held_by(count, head, RING)
    k += head // TILE.group * k_head_stride
    v += head * v_head_stride
    since = held.since + taken
    folds = 0  # how many of the new tokens
    if since >= RING.places:
        folds = taken - since % RING.places
        states = States(state, slot_stride, head_stride, row_stride, column_stride)
        x = natural_decay(log_decay, head)
        old_keys = held_keys(ring, held, TILE, RING)
        planes = Planes(low, scales, scale_slot_stride, scale_head_stride)
        for column in tl.range(0, TILE.E, TILE.columns, num_stages=1):
            S = read_columns(states, planes, slot, head, column, TILE, TILE.columns)
            old_values = held_values(ring, column, held, TILE, TILE.columns, RING)
            S = taken_up(S, old_keys, old_values, held.age, held.tokens, x, RING)
            done = 0
            for block in tl.range(first, last, DRAFTS, num_stages=1):
                new = accepted_from(accepted, block, last, done)
                is_folded = new.is_one & (new.rank < folds)
                done += tl.sum(new.is_one.to(tl.int32), 0)
                until = tl.minimum(done, folds)
                keys = load_rows(k, k_token_stride, new.token, is_folded, 0, TILE.D, TILE.rows, False)
                values = load_rows(v, v_token_stride, new.token, is_folded, column, TILE.E, TILE.columns, False)
                age = tl.where(is_folded, until - 1 - new.rank, 0)
                S = taken_up(S, keys, values, age, tl.sum(is_folded.to(tl.int32), 0), x, RING)
            write_columns(states, planes, slot, head, column, S, TILE, TILE.columns)
        tl.debug_barrier()  # all threads have read what is overwritten now
    done = 0
    for block in tl.range(first, last, DRAFTS, num_stages=1):
        new = accepted_from(accepted, block, last, done)
        is_kept = new.is_one & (new.rank >= folds)
        done += tl.sum(new.is_one.to(tl.int32), 0)
        at = (count + new.rank) % RING.places
        keys = load_rows(k, k_token_stride, new.token, is_kept, 0, TILE.D, TILE.rows, False)
        store_rows(ring.k, TILE.D, at, is_kept, 0, keys, TILE.rows)
        for column in tl.range(0, TILE.E, TILE.columns, num_stages=1):
            values = load_rows(v, v_token_stride, new.token, is_kept, column, TILE.E, TILE.columns, False)
            store_rows(ring.v, TILE.E, at, is_kept, column, values, TILE.columns)
    give(counts, slot, count + taken, ticket, H, lane, RING)


@dispatch.unspecialized(triton.jit)
def fold_kernel(state, slot_stride: "i64", head_stride: "i64", row_stride: "i64", column_stride: "i64", slots, fresh,
                log_decay, ring_k, ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v,
                ring_v_slot_stride: "i64", ring_v_head_stride: "i64", counts, low, scales, scale_slot_stride: "i64",
                scale_head_stride: "i64", H, TILE: tl.constexpr, RING: tl.constexpr):  # fmt: skip
    n, head, column = place(H, TILE)
    slot = slot_of(slots, n)
    if slot < 0:
        return
    count = count_of(counts, slot)
    lane = tl.arange(0, RING.threads)
    ticket = take_ticket(counts, slot, lane)
    held = held_by(count, head, RING)
    if (held.tokens > 0) & starts_from_initial(fresh, n):
        states = States(state, slot_stride, head_stride, row_stride, column_stride)
        planes = Planes(low, scales, scale_slot_stride, scale_head_stride)
        S = read_columns(states, planes, slot, head, column, TILE, TILE.columns)
        ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride, ring_v_head_stride,
                       slot, head)  # fmt: skip
        old_values = held_values(ring, column, held, TILE, TILE.columns, RING)
        x = natural_decay(log_decay, head)
        S = taken_up(S, held_keys(ring, held, TILE, RING), old_values, held.age, held.tokens, x, RING)
        write_columns(states, planes, slot, head, column, S, TILE, TILE.columns)
    tiles: tl.constexpr = (TILE.E + TILE.columns - 1) // TILE.columns
    give(counts, slot, count * 0, ticket, H * tiles, lane, RING)
