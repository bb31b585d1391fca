"""Launches of the operations over states with rings of recent tokens."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lightning_attention.kernels.recent import rows_of_prefill
from lightning_attention.kernels.triton import dispatch, tiling
from lightning_attention.kernels.triton import prefill as without_rings
from lightning_attention.kernels.triton.decode import columns, narrower, over_states
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.ring import (
    RingTile,
    commit_recent_kernel,
    decode_recent_kernel,
    fold_kernel,
    part_kernel,
    verify_recent_kernel,
)

PROGRAMS = 1 << 15  # of a slot, that its count has room for
WHOLE = 128  # columns, of a program that has all of a state's
REGISTERS = {4: 0, 2: 168}  # of a thread of such a program, by the size of a state's numbers; 0: any


@cache
def _constants(places: int, aligned_k: bool, aligned_v: bool) -> tuple[RingTile]:
    return (RingTile(places, tiling.padded(places), aligned_k, aligned_v),)


def _aligned(x: Tensor) -> bool:
    """Whether every row of a ring [S, H, R, width] can be read 16 bytes at a time."""
    slot, head, row, _ = x.stride()
    return not ((slot | head | row) * x.itemsize | x.data_ptr()) & 15


def _ring(k: Tensor, v: Tensor, count: Tensor) -> tuple[tuple[Any, ...], tuple[RingTile]]:
    """A ring as the kernels' arguments, and as their constant."""
    return (k, *k.stride()[:2], v, *v.stride()[:2], count), _constants(k.shape[2], _aligned(k), _aligned(v))


def _columns(D: int, E: int, q: Tensor, state: Tensor, N: int, H: int, batch_invariant: bool) -> tuple[int, int]:
    """Columns of a program of decode, and the most that other calls like it take.

    Where there are states enough, all of a state's: what is done for the ring is most of a program's instructions (875
    a warp with 64 columns and 1,100 with 128), and without that of a second program.
    """
    widest = columns(D, E, q.dtype)
    if batch_invariant:
        return widest, widest
    whole = WHOLE if widest == 64 < E and tiling.padded(D) <= 128 else widest
    return (whole if N * H >= 2048 else narrower(widest, N, H, state.dtype)), whole


def _registers(state: Tensor, TILE: int) -> int:
    """What lets three programs of 64 columns, or four of fewer, run on a multiprocessor at once.

    The compiler would take up to all, for nothing: by these nothing spills but where D is over 128, and where a head
    folds all of a bfloat16 state at once. All of a float32 one wants all of them.
    """
    if torch.version.hip is not None or tiling.device(state)[0] < (8, 0) or state.shape[2] > 128:
        return 0
    if TILE == WHOLE:
        return REGISTERS[state.itemsize]
    return 168 if TILE > 32 else 128


def _check_programs(programs: int) -> None:
    if programs >= PROGRAMS:
        raise ValueError(f"a state has {programs} parts; with recent backend 'triton' takes up to {PROGRAMS - 1}")


@recorded
def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float,
    batch_invariant: bool, ring_k: Tensor, ring_v: Tensor, count: Tensor, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    made = None if out is not None else torch.empty_like(v, memory_format=torch.contiguous_format)
    results = out if made is None else made
    clears = made is not None
    _decode(q, k, v, log_decay, state, slots, None, scale, batch_invariant, ring_k, ring_v, count, results, clears)
    return made


@recorded
def _decode_singles(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor, cu_seqlens: Tensor,
    scale: float, ring_k: Tensor, ring_v: Tensor, count: Tensor, out: Tensor,
) -> None:  # fmt: skip
    _decode(q, k, v, log_decay, state, slots, cu_seqlens.contiguous(), scale, False, ring_k, ring_v, count, out, False)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, batch_invariant: bool, ring_k: Tensor, ring_v: Tensor, count: Tensor,
    out: Tensor | None, clears: bool,
) -> None:  # fmt: skip
    (_, H, E), (_, Hk, D) = v.shape, k.shape
    N = len(v) if slots is None else len(slots)
    TILE, widest = _columns(D, E, q, state, N, H, batch_invariant)
    if N == 0:
        return
    strides, (ring, constants) = state.stride(), _ring(ring_k, ring_v, count)
    args = (
        q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], out, state, *strides, dispatch.dense(slots),
        dispatch.dense(log_decay), cu_seqlens, *ring, H, scale, int(clears),
    )  # fmt: skip
    _check_programs(H * -(-E // TILE))
    over_states(
        decode_recent_kernel, (N, H, D, E, H // Hk), args, state, strides, TILE, widest, ring=constants,
        registers=partial(_registers, state),
    )  # fmt: skip


@recorded
def _parted(cu_seqlens: Tensor, slots: Tensor | None, fresh: Tensor | None) -> tuple[Tensor, Tensor]:
    """The slots of sequences that go on by one token, -1 for the others, and the reverse."""
    N = cu_seqlens.shape[0] - 1
    single, rest = (torch.empty(N, dtype=torch.int32, device=cu_seqlens.device) for _ in range(2))
    fresh = None if fresh is None else fresh.contiguous().view(torch.uint8)
    args = (cu_seqlens.contiguous(), dispatch.dense(slots), fresh, single, rest, N)
    dispatch.run(part_kernel, (-(-N // 256), 1, 1), args, (256,), 4, cu_seqlens.get_device())
    return single, rest


def prefill(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
    slots: Tensor | None, fresh: Tensor | None, scale: float, snapshot_at: Tensor | None,
    snapshot_slots: Tensor | None, batch_invariant: bool, ring_k: Tensor, ring_v: Tensor, count: Tensor,
    out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Of running requests, which have a token each beside the prompts, nearly all is the way of their states.

    They keep their rings, but where the state after such a token is wanted too, for a snapshot, or the bits of a sweep.
    """
    ring = ring_k, ring_v, count
    if batch_invariant or snapshot_at is not None or q.shape[0] == 0:
        rows, empty = rows_of_prefill(slots, fresh, snapshot_slots)
        fold(state, log_decay, rows, empty, *ring)
        return without_rings.prefill(
            q, k, v, log_decay, state, cu_seqlens, slots, fresh, scale, snapshot_at, snapshot_slots, batch_invariant,
            out,
        )  # fmt: skip
    single, rest = _parted(cu_seqlens, slots, fresh)
    fold(state, log_decay, rest, fresh, *ring)
    made = without_rings.prefill(q, k, v, log_decay, state, cu_seqlens, rest, fresh, scale, None, None, False, out)
    results = made if out is None else out
    _decode_singles(q, k, v, log_decay, state, single, cu_seqlens, scale, *ring, results)
    return made


@recorded
def verify(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
    slots: Tensor | None, parents: Tensor | None, scale: float, ring_k: Tensor, ring_v: Tensor, count: Tensor,
    out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    (T, H, E), (_, Hk, D), N = v.shape, k.shape, cu_seqlens.shape[0] - 1
    TILE = columns(D, E, q.dtype, 1 if parents is None else 2)
    made = None if out is not None else torch.empty_like(v, memory_format=torch.contiguous_format)
    if T == 0:
        return made
    strides, (ring, constants) = state.stride(), _ring(ring_k, ring_v, count)
    args = (
        q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], out if made is None else made, state, *strides,
        dispatch.dense(slots), dispatch.dense(log_decay), cu_seqlens.contiguous(), dispatch.dense(parents), *ring, N, T,
        H, scale, int(made is not None),
    )  # fmt: skip
    over_states(
        verify_recent_kernel, (N, H, D, E, H // Hk), args, state, strides, TILE, ring=constants,
        registers=partial(_registers, state),
    )  # fmt: skip
    return made


@recorded
def commit(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, accepted: Tensor,
    slots: Tensor | None, ring_k: Tensor, ring_v: Tensor, count: Tensor,
) -> None:  # fmt: skip
    (T, H, E), (_, Hk, D), N = v.shape, k.shape, cu_seqlens.shape[0] - 1
    TILE = columns(D, E, k.dtype)
    if T == 0:
        return
    strides, (ring, constants) = state.stride(), _ring(ring_k, ring_v, count)
    args = (
        k, *k.stride()[:2], v, *v.stride()[:2], state, *strides, dispatch.dense(slots), dispatch.dense(log_decay),
        cu_seqlens.contiguous(), accepted.contiguous(), *ring, H,
    )  # fmt: skip
    _check_programs(H)
    over_states(
        commit_recent_kernel, (N, H, D, E, H // Hk), args, state, strides, TILE, ring=constants, programs=N * H,
        registers=partial(_registers, state),
    )  # fmt: skip


@recorded
def fold(
    state: Tensor, log_decay: Tensor | None, slots: Tensor | None, fresh: Tensor | None, ring_k: Tensor, ring_v: Tensor,
    count: Tensor,
) -> None:  # fmt: skip
    S, H, D, E = state.shape
    N = S if slots is None else slots.shape[0]
    if ring_k.dtype.itemsize > 4:
        raise TypeError("recent has dtype float64; backend 'triton' takes bfloat16, float16 and float32")
    TILE = columns(D, E, ring_k.dtype)
    if N == 0:
        return
    strides, (ring, constants) = state.stride(), _ring(ring_k, ring_v, count)
    fresh = None if fresh is None else fresh.contiguous().view(torch.uint8)
    args = (state, *strides, dispatch.dense(slots), fresh, dispatch.dense(log_decay), *ring, H)
    _check_programs(H * -(-E // TILE))
    over_states(fold_kernel, (N, H, D, E, 1), args, state, strides, TILE, ring=constants)
