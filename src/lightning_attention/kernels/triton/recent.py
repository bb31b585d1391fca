"""Launches of the operations over states with rings of recent tokens."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lightning_attention.kernels.recent import rows_of_prefill
from lightning_attention.kernels.triton import dispatch, nvidia, tiling
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
from lightning_attention.kernels.triton.ring_decode import decode_ring_kernel

PROGRAMS = 1 << 15  # of a slot, that its count has room for
WHOLE = 128  # columns, of a program that has all of a state's


@cache
def _constants(places: int, aligned_k: bool, aligned_v: bool, heads: int, is_nvidia: bool) -> tuple[RingTile]:
    precision, threads = ("tf32x3", 128) if is_nvidia else ("ieee", 256)  # of four warps
    return (RingTile(places, tiling.padded(places), aligned_k, aligned_v, precision, threads, heads),)


def _ring(k: Tensor, v: Tensor, count: Tensor) -> tuple[tuple[Any, ...], tuple[RingTile]]:
    """A ring as the kernels' arguments, and as their constant."""
    constants = _constants(k.shape[2], nvidia.aligned(k), nvidia.aligned(v), k.shape[1], tiling.device(k)[0] >= (8, 0))
    return (k, *k.stride()[:2], v, *v.stride()[:2], count), constants


def _planes(low: Tensor | None, scale: Tensor | None) -> tuple[Any, ...]:
    """What a pool in 8 bits has beside ``high``, as the kernels' arguments."""
    return (None, None, 0, 0) if scale is None else (low, scale, *scale.stride()[:2])


def _columns(D: int, E: int, q: Tensor, state: Tensor, N: int, H: int, batch_invariant: bool) -> tuple[int, int]:
    """Columns of a program of decode, and the most that other calls like it take; all of a state's where there are
    states enough: what is done for the ring is most of a program's instructions.
    """
    widest = columns(D, E, q.dtype)
    if batch_invariant:
        return widest, widest
    whole = WHOLE if widest == 64 < E and tiling.padded(D) <= 128 else widest
    return (whole if N * H >= 2048 else narrower(widest, N, H, state.dtype)), whole


def _check_programs(programs: int) -> None:
    if programs >= PROGRAMS:
        raise ValueError(f"a state has {programs} parts; with recent backend 'triton' takes up to {PROGRAMS - 1}")


@recorded
def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float,
    batch_invariant: bool, ring_k: Tensor, ring_v: Tensor, count: Tensor, low: Tensor | None = None,
    state_scale: Tensor | None = None, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    made = None if out is not None else torch.empty_like(v, memory_format=torch.contiguous_format)
    results, ring = out if made is None else made, (ring_k, ring_v, count)
    clears = made is not None
    _decode(
        q, k, v, log_decay, state, slots, None, scale, batch_invariant, *ring, low, state_scale, results, clears
    )  # fmt: skip
    return made


@recorded
def _decode_singles(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor, cu_seqlens: Tensor,
    scale: float, ring_k: Tensor, ring_v: Tensor, count: Tensor, out: Tensor,
) -> None:  # fmt: skip
    cuts, ring = cu_seqlens.contiguous(), (ring_k, ring_v, count)
    _decode(q, k, v, log_decay, state, slots, cuts, scale, False, *ring, None, None, out, False)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, batch_invariant: bool, ring_k: Tensor, ring_v: Tensor, count: Tensor,
    low: Tensor | None, state_scale: Tensor | None, out: Tensor | None, clears: bool,
) -> None:  # fmt: skip
    (_, H, E), (_, Hk, D) = v.shape, k.shape
    N = len(v) if slots is None else len(slots)
    TILE, widest = _columns(D, E, q, state, N, H, batch_invariant)
    if N == 0:
        return
    strides, (ring, constants) = state.stride(), _ring(ring_k, ring_v, count)
    before = (q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], out, state)
    planes = _planes(low, state_scale)
    after = (dispatch.dense(slots), dispatch.dense(log_decay), cu_seqlens, *ring, *planes, H, scale, int(clears))
    sizes = N, H, D, E, H // Hk
    if nvidia.takes(N, q, k, v, state, low, state_scale, constants[0]):
        args, width = (*before, *strides[:2], *after), nvidia.width(E, N, H, state, batch_invariant)
        _check_programs(H * (E // width))
        is_short = q.dtype == ring_k.dtype != torch.float32
        registers = partial(nvidia.registers_of_decode, has_planes=low is not None, is_short=is_short)
        nvidia.run(decode_ring_kernel, sizes, width, args, constants, state, registers)
        return
    args = (*before, *strides, *after)
    _check_programs(H * -(-E // TILE))
    over_states(decode_recent_kernel, sizes, args, state, strides, TILE, widest, written=low, ring=constants)


@recorded
def _parted(cu_seqlens: Tensor, slots: Tensor | None, fresh: Tensor | None) -> tuple[Tensor, Tensor]:
    """The slots of sequences that go on by one token, -1 for the others, and the reverse."""
    N = cu_seqlens.shape[0] - 1
    single, rest = (torch.empty(N, dtype=torch.int32, device=cu_seqlens.device) for _ in range(2))
    fresh = None if fresh is None else fresh.contiguous().view(torch.uint8)
    args = (cu_seqlens.contiguous(), dispatch.dense(slots), fresh, single, rest, N)
    dispatch.run(part_kernel, (-(-N // 256), 1, 1), args, (256,), 4, cu_seqlens.get_device())
    return single, rest


@recorded
def prefill(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
    slots: Tensor | None, fresh: Tensor | None, scale: float, snapshot_at: Tensor | None,
    snapshot_slots: Tensor | None, batch_invariant: bool, ring_k: Tensor, ring_v: Tensor, count: Tensor,
    out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """A running request has one token beside the prompts, and most of its cost is to move its state through memory.

    So it keeps its ring, unless the state after that token is wanted too, for a snapshot, or the bits of a sweep.
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
    low: Tensor | None = None, state_scale: Tensor | None = None, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    (T, H, E), (_, Hk, D), N = v.shape, k.shape, cu_seqlens.shape[0] - 1
    TILE = columns(D, E, q.dtype, 1 if parents is None else 2)
    made = None if out is not None else torch.empty_like(v, memory_format=torch.contiguous_format)
    if T == 0:
        return made
    strides, (ring, constants) = state.stride(), _ring(ring_k, ring_v, count)
    before = (q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], out if made is None else made, state)
    slots, log_decay, cuts = dispatch.dense(slots), dispatch.dense(log_decay), cu_seqlens.contiguous()
    after = (*ring, *_planes(low, state_scale), N, T, H, scale, int(made is not None))
    sizes, is_alike = (N, H, D, E, H // Hk), q.dtype == ring_k.dtype
    if is_alike and nvidia.takes_drafts(N, q, k, v, out, parents, state, low, state_scale, constants[0]):
        nvidia.verify(sizes, (*before, *strides[:2], slots, log_decay, cuts, *after), constants, state)
        return made
    args = (*before, *strides, slots, log_decay, cuts, dispatch.dense(parents), *after)
    over_states(verify_recent_kernel, sizes, args, state, strides, TILE, written=low, ring=constants)
    return made


@recorded
def commit(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, accepted: Tensor,
    slots: Tensor | None, ring_k: Tensor, ring_v: Tensor, count: Tensor, low: Tensor | None = None,
    state_scale: Tensor | None = None,
) -> None:  # fmt: skip
    (T, H, E), (_, Hk, D), N = v.shape, k.shape, cu_seqlens.shape[0] - 1
    TILE = columns(D, E, k.dtype)
    if T == 0:
        return
    _check_programs(H)
    strides, (ring, constants) = state.stride(), _ring(ring_k, ring_v, count)
    before = k, *k.stride()[:2], v, *v.stride()[:2], state
    after = dispatch.dense(slots), dispatch.dense(log_decay), cu_seqlens.contiguous(), accepted.contiguous(), *ring
    sizes, is_alike = (N, H, D, E, H // Hk), k.dtype == ring_k.dtype
    if is_alike and nvidia.takes_accepted(N, k, v, state, low, constants[0]):
        nvidia.commit(sizes, (*before, *strides[:2], *after), constants, state)
        return
    args = (*before, *strides, *after, *_planes(low, state_scale), H)
    over_states(
        commit_recent_kernel, sizes, args, state, strides, TILE, written=low, ring=constants, programs=N * H
    )  # fmt: skip


@recorded
def fold(
    state: Tensor, log_decay: Tensor | None, slots: Tensor | None, fresh: Tensor | None, ring_k: Tensor, ring_v: Tensor,
    count: Tensor, low: Tensor | None = None, state_scale: Tensor | None = None,
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
    args = (
        state, *strides, dispatch.dense(slots), fresh, dispatch.dense(log_decay), *ring, *_planes(low, state_scale), H
    )  # fmt: skip
    _check_programs(H * -(-E // TILE))
    over_states(fold_kernel, (N, H, D, E, 1), args, state, strides, TILE, written=low, ring=constants)
