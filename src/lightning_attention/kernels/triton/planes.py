"""States in the kernels, whether a pool is of floats or, in 8 bits, of two planes.

kernels/quantized.py says what planes hold. A program has all rows of its columns, and so finds their scales by itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lightning_attention.kernels import quantized
from lightning_attention.kernels.triton.recurrent import States, columns_at, load_row, store_row

LEVELS: tl.constexpr = tl.constexpr(quantized.LEVELS)
PARTS: tl.constexpr = tl.constexpr(quantized.PARTS)
LEAST: tl.constexpr = tl.constexpr(quantized.LEAST)
LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)
ROUNDING: tl.constexpr = tl.constexpr(1.5 * 2.0**23)  # float32s near it are the whole numbers


class Planes(NamedTuple):
    """What a pool in 8 bits has beside ``high``: low, of the same strides, and scale; None in a pool of floats."""

    low: tl.tensor
    scale: tl.tensor
    slot_stride: tl.tensor  # of scale
    head_stride: tl.tensor


@triton.jit
def low_at(states, planes, slot, head, column, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Where some columns of the second plane lie."""
    low = States(planes.low, states.slot_stride, states.head_stride, states.row_stride, states.column_stride)
    where, _ = columns_at(low, slot, head, column, TILE, COLUMNS)
    return where


@triton.jit
def scale_of(planes, slot, head, column, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns' scales; 1 in a pool of floats."""
    by = tl.full([COLUMNS], 1.0, tl.float32)
    if planes.low is not None:
        by = load_row(planes.scale + slot * planes.slot_stride + head * planes.head_stride, column, TILE.E, COLUMNS)
    return by


@triton.jit
def read_columns(states, planes, slot, head, column, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of a state as exactly as they are kept, in float32."""
    where, exists = columns_at(states, slot, head, column, TILE, COLUMNS)
    S = tl.load(where, mask=exists, other=0).to(tl.float32)
    if planes.low is not None:
        low = tl.load(low_at(states, planes, slot, head, column, TILE, COLUMNS), mask=exists, other=0).to(tl.float32)
        by = scale_of(planes, slot, head, column, TILE, COLUMNS)
        S = S * by[None, :] + low * (by / PARTS)[None, :]
    return S


@triton.jit
def write_columns(states, planes, slot, head, column, S, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse. Where S is in 8 bits, rows that do not exist are zero."""
    where, exists = columns_at(states, slot, head, column, TILE, COLUMNS)
    if planes.low is None:
        tl.store(where, S, mask=exists)
    else:
        high, low, by = planes_of(S)
        tl.store(where, high, mask=exists)
        tl.store(low_at(states, planes, slot, head, column, TILE, COLUMNS), low, mask=exists)
        store_row(planes.scale + slot * planes.slot_stride + head * planes.head_stride, column, TILE.E, by, COLUMNS)


@triton.jit
def planes_of(S):
    """Columns of a state as high, low and their scales."""
    # Not by the largest number: whether a NaN is one differs from chip to chip.
    is_finite = tl.sum((tl.abs(S) <= LARGEST).to(tl.int32), 0) == S.shape[0]
    by = tl.maximum(tl.max(tl.where(is_finite[None, :], tl.abs(S), 0.0), 0) / LEVELS, LEAST)
    high, low = in_planes(tl.where(is_finite[None, :], S, 0.0), by[None, :], 1.0 / by[None, :])
    return high, low, tl.where(is_finite, by, float("nan"))


@triton.jit
def in_planes(S, by, per):
    """Numbers in two planes, ``by`` being the scale and ``per`` 1 / by: none is past 127 by half a step."""
    high = S * per + ROUNDING
    low = (S - (high - ROUNDING) * by) * (per * PARTS) + ROUNDING
    return high.to(tl.int32, bitcast=True).to(tl.int8), low.to(tl.int32, bitcast=True).to(tl.int8)
