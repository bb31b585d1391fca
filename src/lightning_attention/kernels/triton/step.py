"""The recurrence in registers, over states in a pool: a token, drafts that leave no trace, drafts that are accepted.

A program has all D rows of TE columns of one head's state, and so needs nobody's help for its part of the output. It
reads the state once, and writes it once or not at all. Nothing is specialized, which the calls by ``launcher.run`` rely
on.
"""

import triton
import triton.language as tl

from lightning_attention.kernels.triton.part import inherits, natural_decay, whole_and_rest


@triton.jit
def place(program, H, E: tl.constexpr, TE: tl.constexpr):
    """Sequence, head and first column of a program; those of one state are neighbours."""
    tiles: tl.constexpr = (E + TE - 1) // TE
    return program // tiles // H, program // tiles % H, program % tiles * TE


@triton.jit
def slot_of(slots, n):
    """The row of the pool that is sequence n's, 64 bits wide, for a pool has more than 2^31 elements."""
    if slots is None:
        slot = n.to(tl.int64)
    else:
        slot = tl.load(slots + n).to(tl.int64)
    return slot


@triton.jit
def state_tile(state, slot, head, column, s_slot, s_head, s_row, s_column, D: tl.constexpr, E: tl.constexpr,
               BD: tl.constexpr, TE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Where a program's part of a state lies, and which of it exists."""
    row = tl.arange(0, BD)
    col = column + tl.arange(0, TE)
    where = state + slot * s_slot + head * s_head + row[:, None] * s_row
    if ALIGNED:
        where = tl.multiple_of(where + col[None, :], [16, 16])
    else:
        where = where + col[None, :] * s_column
    return where, (row < D)[:, None] & (col < E)[None, :]


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


@triton.jit(do_not_specialize=["q", "k", "v", "out", "state", "slots", "log_decay", "q_token", "q_head", "k_token",
                               "k_head", "v_token", "v_head", "s_slot", "s_head", "s_row", "s_column",
                               "H"])  # fmt: skip
def decode_kernel(q, k, v, out, state, slots, log_decay, q_token: "i64", q_head: "i64", k_token: "i64", k_head: "i64",
                  v_token: "i64", v_head: "i64", s_slot: "i64", s_head: "i64", s_row: "i64", s_column: "i64", H, scale,
                  D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, TE: tl.constexpr,
                  ALIGNED: tl.constexpr):  # fmt: skip
    n, head, column = place(tl.program_id(0), H, E, TE)
    slot = slot_of(slots, n)
    o = out + (n.to(tl.int64) * H + head) * E
    if slot < 0:
        store_row(o, column, E, tl.zeros([TE], tl.float32), TE)
        return
    where, exists = state_tile(state, slot, head, column, s_slot, s_head, s_row, s_column, D, E, BD, TE, ALIGNED)
    S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    k_row = load_row(k + n * k_token + head * k_head, 0, D, BD)
    v_row = load_row(v + n * v_token + head * v_head, column, E, TE)
    q_row = load_row(q + n * q_token + head * q_head, 0, D, BD)
    whole, rest = decay_of(log_decay, head)
    S = step(S, k_row, v_row, whole, rest)
    tl.store(where, S, mask=exists)
    store_row(o, column, E, tl.sum(q_row[:, None] * S, 0) * scale, TE)


@triton.jit(do_not_specialize=["q", "k", "v", "out", "state", "cu_seqlens", "slots", "parents", "log_decay", "q_token",
                               "q_head", "k_token", "k_head", "v_token", "v_head", "s_slot", "s_head", "s_row",
                               "s_column", "N", "T", "H"])  # fmt: skip
def verify_kernel(q, k, v, out, state, cu_seqlens, slots, parents, log_decay, q_token: "i64", q_head: "i64",
                  k_token: "i64", k_head: "i64", v_token: "i64", v_head: "i64", s_slot: "i64", s_head: "i64",
                  s_row: "i64", s_column: "i64", N, T, H, scale, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
                  TE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    n, head, column = place(tl.program_id(0), H, E, TE)
    first = tl.load(cu_seqlens + n).to(tl.int64)
    last = tl.load(cu_seqlens + n + 1).to(tl.int64)
    slot = slot_of(slots, n)
    zero = tl.zeros([TE], tl.float32)
    # Tokens past the last sequence are padding, and every sequence's programs clear their share of them.
    for t in range(tl.load(cu_seqlens + N).to(tl.int64) + n, T, N):
        store_row(out + (t * H + head) * E, column, E, zero, TE)
    if slot < 0:
        for t in range(first, last):
            store_row(out + (t * H + head) * E, column, E, zero, TE)
        return
    if first == last:
        return
    where, exists = state_tile(state, slot, head, column, s_slot, s_head, s_row, s_column, D, E, BD, TE, ALIGNED)
    start = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    whole, rest = decay_of(log_decay, head)
    q += head * q_head
    k += head * k_head
    v += head * v_head
    S = start
    for t in range(first, last):
        if parents is not None:
            up = tl.minimum(tl.load(parents + t).to(tl.int64), t - first - 1)
            if up != t - first - 1:
                # S is another branch's: make the parent's, from it up to the state. That a parent comes earlier is
                # nowhere checked on a GPU, and the walk ends whatever ``parents`` holds.
                S = tl.zeros([BD, TE], tl.float32)
                weight = 1.0
                while up >= 0:
                    k_row = load_row(k + (first + up) * k_token, 0, D, BD) * weight
                    v_row = load_row(v + (first + up) * v_token, column, E, TE)
                    S += k_row[:, None] * v_row[None, :]
                    weight = weight * whole + weight * rest
                    up = tl.minimum(tl.load(parents + first + up).to(tl.int64), up - 1)
                S += start * weight
        k_row = load_row(k + t * k_token, 0, D, BD)
        v_row = load_row(v + t * v_token, column, E, TE)
        q_row = load_row(q + t * q_token, 0, D, BD)
        S = step(S, k_row, v_row, whole, rest)
        store_row(out + (t * H + head) * E, column, E, tl.sum(q_row[:, None] * S, 0) * scale, TE)


@triton.jit(do_not_specialize=["k", "v", "state", "cu_seqlens", "accepted", "slots", "log_decay", "k_token", "k_head",
                               "v_token", "v_head", "s_slot", "s_head", "s_row", "s_column", "H"])  # fmt: skip
def commit_kernel(k, v, state, cu_seqlens, accepted, slots, log_decay, k_token: "i64", k_head: "i64", v_token: "i64",
                  v_head: "i64", s_slot: "i64", s_head: "i64", s_row: "i64", s_column: "i64", H, D: tl.constexpr,
                  E: tl.constexpr, BD: tl.constexpr, TE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    n, head, column = place(tl.program_id(0), H, E, TE)
    first = tl.load(cu_seqlens + n).to(tl.int64)
    last = tl.load(cu_seqlens + n + 1).to(tl.int64)
    slot = slot_of(slots, n)
    taken = 0
    for t in range(first, last, 32):
        token = t + tl.arange(0, 32)
        taken += tl.sum(tl.load(accepted + token, mask=token < last, other=0).to(tl.int32), 0)
    if (slot < 0) | (taken == 0):
        return
    where, exists = state_tile(state, slot, head, column, s_slot, s_head, s_row, s_column, D, E, BD, TE, ALIGNED)
    S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    whole, rest = decay_of(log_decay, head)
    k += head * k_head
    v += head * v_head
    for t in range(first, last):
        if tl.load(accepted + t):
            k_row = load_row(k + t * k_token, 0, D, BD)
            v_row = load_row(v + t * v_token, column, E, TE)
            S = step(S, k_row, v_row, whole, rest)
    tl.store(where, S, mask=exists)


@triton.jit(do_not_specialize=["q", "k", "v", "out", "state", "cu_seqlens", "slots", "fresh", "log_decay", "q_token",
                               "q_head", "k_token", "k_head", "v_token", "v_head", "s_slot", "s_head", "s_row",
                               "s_column", "H", "short"])  # fmt: skip
def short_kernel(q, k, v, out, state, cu_seqlens, slots, fresh, log_decay, q_token: "i64", q_head: "i64",
                 k_token: "i64", k_head: "i64", v_token: "i64", v_head: "i64", s_slot: "i64", s_head: "i64",
                 s_row: "i64", s_column: "i64", H, short, scale, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
                 TE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Of a packed batch the sequences of at most ``short`` rows; a fresh one of none leaves zero."""
    n, head, column = place(tl.program_id(0), H, E, TE)
    first = tl.load(cu_seqlens + n).to(tl.int64)
    last = tl.load(cu_seqlens + n + 1).to(tl.int64)
    slot = slot_of(slots, n)
    inherited = inherits(fresh, n)
    if (slot < 0) | (last - first > short) | ((last == first) & inherited):
        return
    where, exists = state_tile(state, slot, head, column, s_slot, s_head, s_row, s_column, D, E, BD, TE, ALIGNED)
    S = tl.zeros([BD, TE], tl.float32)
    if inherited:
        S = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    whole, rest = decay_of(log_decay, head)
    q += head * q_head
    k += head * k_head
    v += head * v_head
    for t in range(first, last):
        k_row = load_row(k + t * k_token, 0, D, BD)
        v_row = load_row(v + t * v_token, column, E, TE)
        q_row = load_row(q + t * q_token, 0, D, BD)
        S = step(S, k_row, v_row, whole, rest)
        store_row(out + (t * H + head) * E, column, E, tl.sum(q_row[:, None] * S, 0) * scale, TE)
    tl.store(where, S, mask=exists)
