"""Rows of a pool in 8 bits from and to float32, and prefill over such a pool.

kernels/quantized.py says what the planes hold. A program has all D rows of some columns of one head's state, as in
recurrent.py, and so finds the columns' scales by itself.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels import quantized
from lightning_attention.kernels.triton import dispatch, recent, tiling
from lightning_attention.kernels.triton import prefill as over_floats
from lightning_attention.kernels.triton.decode import columns
from lightning_attention.kernels.triton.numerics import natural_decay
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.recurrent import (
    States,
    StateTile,
    load_row,
    place,
    slot_of,
    state_tile,
    store_row,
    zero_state,
)
from lightning_attention.kernels.triton.ring import RingTile, held_by, held_keys, held_values, ring_of, taken_up
from lightning_attention.kernels.triton.work import starts_from_initial

LEVELS: tl.constexpr = tl.constexpr(quantized.LEVELS)
PARTS: tl.constexpr = tl.constexpr(quantized.PARTS)
LEAST: tl.constexpr = tl.constexpr(quantized.LEAST)
LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)

NO_RING = RingTile(1, tiling.padded(1), False, False, "ieee", 128, 1)


def dequantize(high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None) -> Tensor:
    N = len(high) if slots is None else len(slots)
    states = torch.empty(N, *high.shape[1:], dtype=torch.float32, device=high.device)
    _dequantize(high, low, scale, slots, None, None, None, None, None, states)
    return states


def quantize(states: Tensor, high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None) -> None:
    _quantize(states.contiguous(), high, low, scale, slots, None)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
    slots: Tensor | None, fresh: Tensor | None, scale: float, snapshot_at: Tensor | None,
    snapshot_slots: Tensor | None, batch_invariant: bool, ring_k: Tensor | None, ring_v: Tensor | None,
    count: Tensor | None, low: Tensor | None, state_scale: Tensor | None, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Over float32 copies of the rows, into which go what their rings hold; over floats, as ``recent.prefill``."""
    if low is None or state_scale is None:
        return recent.prefill(
            q, k, v, log_decay, state, cu_seqlens, slots, fresh, scale, snapshot_at, snapshot_slots, batch_invariant,
            ring_k, ring_v, count, out,
        )  # fmt: skip
    rows, places, snapshots = quantized.rows_of_prefill(slots, cu_seqlens, snapshot_at, snapshot_slots)
    states = torch.empty(len(rows), *state.shape[1:], dtype=torch.float32, device=state.device)
    _dequantize(state, low, state_scale, slots, fresh, log_decay, ring_k, ring_v, count, states[: len(places)])
    made = over_floats.prefill(
        q, k, v, log_decay, states, cu_seqlens, places, None, scale, snapshot_at, snapshots, batch_invariant, out
    )
    _quantize(states, state, low, state_scale, rows, count)
    return made


@cache
def _constants(D: int, E: int, aligned: bool) -> tuple[StateTile]:
    return (StateTile(D, E, tiling.padded(D), columns(D, E, torch.float32), aligned, False, 1),)


def _planes(high: Tensor, low: Tensor, scale: Tensor, states: Tensor) -> tuple[tuple[Any, ...], tuple[StateTile]]:
    """A pool in 8 bits as the kernels' arguments, and their constant."""
    D, E = high.shape[2:]
    starts = high.stride(0) | high.stride(1) | E | high.data_ptr() | low.data_ptr() | states.data_ptr()
    return (high, *high.stride()[:2], low, scale, *scale.stride()[:2], states), _constants(D, E, not starts & 15)


@recorded
def _dequantize(
    high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None, fresh: Tensor | None, log_decay: Tensor | None,
    ring_k: Tensor | None, ring_v: Tensor | None, count: Tensor | None, states: Tensor,
) -> None:  # fmt: skip
    """Write rows, and what their rings hold, to ``states`` [N, H, D, E], contiguous; zero for padding and ``fresh``."""
    (N, H, _, E), (args, constants) = states.shape, _planes(high, low, scale, states)
    if N == 0:
        return
    ring, places = (None, 0, 0, None, 0, 0, None), NO_RING
    if ring_k is not None and ring_v is not None and count is not None:
        ring, (places,) = recent._ring(ring_k, ring_v, count)
    fresh = None if fresh is None else fresh.contiguous().view(torch.uint8)
    args = (*args, dispatch.dense(slots), fresh, dispatch.dense(log_decay), *ring, H)
    _run(dequantize_kernel, N * H * -(-E // constants[0].columns), args, (*constants, places), high)


@recorded
def _quantize(
    states: Tensor, high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None, count: Tensor | None
) -> None:
    """Write ``states`` [N, H, D, E], contiguous, to rows of a pool, whose rings are then empty."""
    (N, H, _, E), (args, constants) = states.shape, _planes(high, low, scale, states)
    if N == 0:
        return
    args = (*args, dispatch.dense(slots), count, H)
    _run(quantize_kernel, N * H * -(-E // constants[0].columns), args, constants, high)


def _run(kernel: Any, programs: int, args: tuple[Any, ...], constants: tuple[Any, ...], high: Tensor) -> None:
    dispatch.run(kernel, (programs, 1, 1), args, constants, 4, high.get_device())


@triton.jit
def planes_tile(high, low, slot_stride, head_stride, slot, head, column, TILE: tl.constexpr):
    """Where a program's part of both planes lies, and which of it exists."""
    where, exists = state_tile(States(high, slot_stride, head_stride, TILE.E, 1), slot, head, column, TILE)
    low_where, _ = state_tile(States(low, slot_stride, head_stride, TILE.E, 1), slot, head, column, TILE)
    return where, low_where, exists


@dispatch.unspecialized(triton.jit)
def dequantize_kernel(
        high, slot_stride: "i64", head_stride: "i64", low, scale, scale_slot_stride: "i64", scale_head_stride: "i64",
        states, slots, fresh, log_decay, ring_k, ring_k_slot_stride: "i64", ring_k_head_stride: "i64", ring_v,
        ring_v_slot_stride: "i64", ring_v_head_stride: "i64", counts, H, TILE: tl.constexpr,
        RING: tl.constexpr):  # fmt: skip
    n, head, column = place(H, TILE)
    slot = slot_of(slots, n)
    S = zero_state(TILE)
    if (slot >= 0) & starts_from_initial(fresh, n):
        where, low_where, exists = planes_tile(high, low, slot_stride, head_stride, slot, head, column, TILE)
        by = load_row(scale + slot * scale_slot_stride + head * scale_head_stride, column, TILE.E, TILE.columns)
        S = tl.load(where, mask=exists, other=0).to(tl.float32) * by[None, :]
        S += tl.load(low_where, mask=exists, other=0).to(tl.float32) * (by / PARTS)[None, :]
        if counts is not None:
            ring = ring_of(ring_k, ring_k_slot_stride, ring_k_head_stride, ring_v, ring_v_slot_stride,
                           ring_v_head_stride, slot, head)  # fmt: skip
            held = held_by(tl.load(counts + slot), head, RING)
            keys, values = held_keys(ring, held, TILE, RING), held_values(ring, column, held, TILE, TILE.columns, RING)
            S = taken_up(S, keys, values, held.age, held.tokens, natural_decay(log_decay, head), RING)
    size: tl.constexpr = TILE.D * TILE.E
    where, exists = state_tile(States(states, H * size, size, TILE.E, 1), n.to(tl.int64), head, column, TILE)
    tl.store(where, S, mask=exists)


@triton.jit
def planes_of(S):
    """A program's part of a state as high, low and the columns' scales."""
    # Not by the largest number: whether a NaN is one differs from chip to chip.
    is_finite = tl.sum((tl.abs(S) <= LARGEST).to(tl.int32), 0) == S.shape[0]
    by = tl.maximum(tl.max(tl.where(is_finite[None, :], tl.abs(S), 0.0), 0) / LEVELS, LEAST)
    S = tl.where(is_finite[None, :], S, 0.0)
    per = 1.0 / by
    high = nearest(S * per[None, :])
    low = nearest((S - high * by[None, :]) * (per * PARTS)[None, :])
    return high.to(tl.int8), low.to(tl.int8), tl.where(is_finite, by, float("nan"))


@triton.jit
def nearest(x):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), -LEVELS), LEVELS)


@dispatch.unspecialized(triton.jit)
def quantize_kernel(
        high, slot_stride: "i64", head_stride: "i64", low, scale, scale_slot_stride: "i64", scale_head_stride: "i64",
        states, slots, counts, H, TILE: tl.constexpr):  # fmt: skip
    n, head, column = place(H, TILE)
    slot = slot_of(slots, n)
    if slot < 0:
        return
    size: tl.constexpr = TILE.D * TILE.E
    where, exists = state_tile(States(states, H * size, size, TILE.E, 1), n.to(tl.int64), head, column, TILE)
    high_rows, low_rows, by = planes_of(tl.load(where, mask=exists, other=0.0))
    where, low_where, exists = planes_tile(high, low, slot_stride, head_stride, slot, head, column, TILE)
    tl.store(where, high_rows, mask=exists)
    tl.store(low_where, low_rows, mask=exists)
    store_row(scale + slot * scale_slot_stride + head * scale_head_stride, column, TILE.E, by, TILE.columns)
    if counts is not None:
        if (head == 0) & (column == 0):
            tl.store(counts + slot, 0)
