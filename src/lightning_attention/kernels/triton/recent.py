"""Launches of the operations over states with rings of recent tokens."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_attention.kernels.recent import rows_of_prefill
from lightning_attention.kernels.triton import dispatch, tiling
from lightning_attention.kernels.triton import prefill as without_rings
from lightning_attention.kernels.triton.decode import columns, layout, narrower, over_states, tile_constants
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.ring import (
    RingTile,
    commit_recent_kernel,
    decode_recent_kernel,
    fold_kernel,
    part_kernel,
    verify_recent_kernel,
)
from lightning_attention.kernels.triton.ring_commit import commit_ring_kernel
from lightning_attention.kernels.triton.ring_decode import COLUMNS, PLACES, decode_ring_kernel
from lightning_attention.kernels.triton.ring_verify import verify_ring_kernel

PROGRAMS = 1 << 15  # of a slot, that its count has room for
WHOLE = 128  # columns, of a program that has all of a state's
#: Of a thread, next to nothing spilled, so that 16 programs of decode (12 of float32 over 8 bits), 13 of verify and 5
#: of commit, which have four warps, run on a multiprocessor at once.
REGISTERS = {
    "decode": 128, "decode of 64 columns": 152, "decode in 8 bits": 136, "decode of float32 in 8 bits": 168,
    "verify": 152, "verify of 64 columns": 168, "commit": 96,
}  # fmt: skip


@cache
def _constants(places: int, aligned_k: bool, aligned_v: bool, heads: int, is_nvidia: bool) -> tuple[RingTile]:
    precision, threads = ("tf32x3", 128) if is_nvidia else ("ieee", 256)  # of four warps
    return (RingTile(places, tiling.padded(places), aligned_k, aligned_v, precision, threads, heads),)


def _aligned(x: Tensor) -> bool:
    """Whether every row of x [..., width], whose rows are contiguous, can be read 16 bytes at a time."""
    strides = x.stride()
    together = strides[0] | strides[1] | strides[-2]
    return not (together * x.itemsize | x.data_ptr()) & 15


def _ring(k: Tensor, v: Tensor, count: Tensor) -> tuple[tuple[Any, ...], tuple[RingTile]]:
    """A ring as the kernels' arguments, and as their constant."""
    constants = _constants(k.shape[2], _aligned(k), _aligned(v), k.shape[1], tiling.device(k)[0] >= (8, 0))
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


def _read_as_used(
    N: int, q: Tensor, k: Tensor, v: Tensor, state: Tensor, low: Tensor | None, scale: Tensor | None, ring: RingTile
) -> bool:
    """Whether ``ring_decode.py`` takes such a call: on an NVIDIA chip, whole rows, sizes that its lanes share out."""
    D, E = k.shape[-1], v.shape[-1]
    return (
        tiling.device(state)[0] >= (8, 0)
        and N < 1 << 16  # programs in the second direction of a grid
        and D in (64, 128)
        and E % COLUMNS.value == 0
        and ring.places <= PLACES.value
        and ring.aligned_k
        and ring.aligned_v
        and all(x is None or layout(x, x.stride(), D, E) == (True, False) for x in (state, low))
        and all(x is None or _aligned(x) for x in (q, k, v, scale))
    )


def _width(E: int, N: int, H: int, state: Tensor, batch_invariant: bool) -> int:
    """Columns of a program of ``ring_decode.py``: twice as many where numbers are small and there are states enough.

    They are then whole lines of memory, and what a program does once it does less often. Of bfloat16 states, H 64, N 64
    and 256, twice as many take 62 and 178 µs instead of 67 and 203. Four times as many in 8 bits took 174 for 166.
    """
    is_wide = E % (2 * COLUMNS.value) == 0 and state.itemsize < 4 and (batch_invariant or N * H >= 4096)
    return 2 * COLUMNS.value if is_wide else COLUMNS.value


def _kind(width: int, has_planes: bool, is_short: bool) -> str:
    """A program of decode, as ``REGISTERS`` has it."""
    if has_planes:
        return "decode in 8 bits" if is_short else "decode of float32 in 8 bits"
    return "decode" if width == COLUMNS.value else "decode of 64 columns"


def _run_as_used(
    kernel: Any, N: int, H: int, D: int, E: int, group: int, columns: int, args: tuple[Any, ...],
    ring: tuple[RingTile], state: Tensor, registers: int,
) -> None:  # fmt: skip
    """Launch a program for each so many columns of a state, with so many registers a thread."""
    parts = H * (E // columns)
    _check_programs(parts)
    tile = tile_constants(D, E, group, columns, True, False)
    dispatch.run(kernel, (parts, N, 1), args, tile + ring, 1, state.get_device(), registers=lambda _: registers)


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
    if _read_as_used(N, q, k, v, state, low, state_scale, constants[0]):
        is_short = q.dtype == ring_k.dtype != torch.float32
        args, width = (*before, *strides[:2], *after), _width(E, N, H, state, batch_invariant)
        registers = REGISTERS[_kind(width, low is not None, is_short)]
        _run_as_used(decode_ring_kernel, N, H, D, E, H // Hk, width, args, constants, state, registers)
        return
    args = (*before, *strides, *after)
    _check_programs(H * -(-E // TILE))
    over_states(
        decode_recent_kernel, (N, H, D, E, H // Hk), args, state, strides, TILE, widest, written=low, ring=constants
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


@recorded
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
    is_short = q.dtype == ring_k.dtype != torch.float32 and (out is None or _aligned(out))
    if parents is None and is_short and _read_as_used(N, q, k, v, state, low, state_scale, constants[0]):
        args, width = (*before, *strides[:2], slots, log_decay, cuts, *after), _width(E, N, H, state, False)
        registers = REGISTERS["verify" if width == COLUMNS.value else "verify of 64 columns"]
        _run_as_used(verify_ring_kernel, N, H, D, E, H // Hk, width, args, constants, state, registers)
        return made
    args = (*before, *strides, slots, log_decay, cuts, dispatch.dense(parents), *after)
    over_states(
        verify_recent_kernel, (N, H, D, E, H // Hk), args, state, strides, TILE, written=low, ring=constants
    )  # fmt: skip
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
    is_plain = E in (32, 64, 128, 256) and k.dtype == ring_k.dtype
    if is_plain and low is None and _read_as_used(N, k, k, v, state, low, state_scale, constants[0]):
        args, tile = (*before, *strides[:2], *after), tile_constants(D, E, H // Hk, COLUMNS.value, True, False)
        dispatch.run(
            commit_ring_kernel, (H, N, 1), args, tile + constants, E // COLUMNS.value, state.get_device(),
            registers=lambda _: REGISTERS["commit"],
        )  # fmt: skip
        return
    args = (*before, *strides, *after, *_planes(low, state_scale), H)
    over_states(
        commit_recent_kernel, (N, H, D, E, H // Hk), args, state, strides, TILE, written=low, ring=constants,
        programs=N * H,
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
