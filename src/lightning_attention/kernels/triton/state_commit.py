"""Accepted drafts into states without rings on NVIDIA chips, in Gluon: what ``commit_kernel`` computes, to the bit.

Nothing is summed over D, so a program has some rows of a state and all columns. Each thread loads what it uses of keys
and values itself, those of several drafts at once: in Triton rows pass through shared memory, and each is waited for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import natural_decay, whole_and_rest
from lightning_attention.kernels.triton.ring_commit import accepted_from, any_accepted, drafts_of, ones_of
from lightning_attention.kernels.triton.ring_decode import width_of

AHEAD = gl.constexpr(4)  # drafts, of which keys and values are loaded before the first is used
BLOCK = gl.constexpr(32)  # drafts, of which a number has a bit each
WARPS = gl.constexpr(4)


@gluon.constexpr_function
def rows_layout(E, width):
    """Rows of a state: a thread has ``width`` columns, 16 bytes, of as many rows as make 32 numbers."""
    lanes = min(32, E // width)
    return gl.BlockedLayout([32 // width, width], [32 // lanes, lanes], [WARPS, 1], [1, 0])


def rows_of(D: int, E: int, width: int) -> int:
    """How many rows of a state a program has."""
    return min(D, 32 // width * (32 // min(32, E // width)) * WARPS.value)


@dispatch.unspecialized(gluon.jit)
def commit_state_kernel(
        k, k_token_stride: "i64", k_head_stride: "i64", v, v_token_stride: "i64", v_head_stride: "i64", state,
        slot_stride: "i64", head_stride: "i64", slots, log_decay, cu_seqlens, accepted,
        TILE: gl.constexpr):  # fmt: skip
    """The arguments are those of ``commit_kernel``, of calls that ``nvidia.takes_accepted`` is true of."""
    E: gl.constexpr = TILE.E
    ROWS: gl.constexpr = TILE.rows
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    LAYOUT: gl.constexpr = rows_layout(E, width_of(state.dtype.element_ty))
    head = gl.program_id(0) // (TILE.D // ROWS)
    row = gl.program_id(0) % (TILE.D // ROWS) * ROWS
    n = gl.program_id(1)
    first, length, slot = drafts_of(cu_seqlens, slots, n)
    if (slot < 0) | (length <= 0):
        return
    accepted += first
    bits = accepted_from(accepted, 0, length, BLOCK, LANES)
    if not any_accepted(accepted, bits, length, BLOCK, LANES):
        return
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, E, layout=gl.SliceLayout(0, LAYOUT))
    where = state + slot * slot_stride + head * head_stride + rows[:, None] * E + cols[None, :]
    where = gl.multiple_of(where, [1, 16])
    S = gl.load(where).to(gl.float32)
    whole, rest = whole_and_rest(natural_decay(log_decay, head))
    k += first * k_token_stride + head // TILE.group * k_head_stride
    v += first * v_token_stride + head * v_head_stride
    for block in range(0, length, BLOCK):
        if block > 0:
            bits = accepted_from(accepted, block, length, BLOCK, LANES)
        while bits != 0:
            taken, keys, values = (), (), ()
            for _ in gl.static_range(AHEAD):
                draft = block + ones_of((bits & -bits) - 1)  # the first that is left
                is_one = bits != 0
                taken += (is_one,)
                keys += (gl.load(gl.multiple_of(k + draft * k_token_stride + rows, 16), mask=is_one, other=0.0),)
                values += (gl.load(gl.multiple_of(v + draft * v_token_stride + cols, 16), mask=is_one, other=0.0),)
                bits = bits & (bits - 1)
            for i in gl.static_range(AHEAD):
                if taken[i]:
                    key, value = keys[i].to(gl.float32)[:, None], values[i].to(gl.float32)[None, :]
                    S = gl.fma(S, whole, gl.fma(S, rest, key * value))
    gl.store(where, S.to(state.dtype.element_ty))
