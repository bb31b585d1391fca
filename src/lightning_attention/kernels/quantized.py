"""Pools of states in 8 bits, in plain PyTorch.

A column of a state, over D, has one scale, of which its largest number is 127. ``high`` is each number in whole scales,
and ``low`` what that leaves, in 254ths. Steps read ``high``. Who writes a state starts from both, so that what ``high``
rounds away is not lost: by ``high`` alone the roundings of a state that does not decay would add up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_attention.kernels import pool

#: The largest number of a column, in scales.
LEVELS = 127

#: Steps of ``low`` in a scale: half a scale, the most that ``high`` leaves, is 127 of them.
PARTS = 254

#: The least scale that is written, so that a step of ``low`` still has all of float32's bits. Smaller columns, of zeros
#: too, are counted in it.
LEAST = 2.0**-100


class Planes(NamedTuple):
    """high and low [S, H, D, E] int8 and scale [S, H, 1, E] float32, of all slots or of the N sequences of a call."""

    high: Tensor
    low: Tensor
    scale: Tensor


def quantized(states: Tensor) -> Planes:
    """A column with a NaN or an infinity gets a scale that is not finite, and numbers 0: it reads as NaN all over."""
    scale = (states.abs().amax(-2, keepdim=True) / LEVELS).clamp(min=LEAST).float()
    by = scale.to(states.dtype)
    is_finite = by.isfinite()
    high = torch.where(is_finite, states / by, 0).round()
    low = torch.where(is_finite, (states - high * by) * (PARTS / by), 0).round()
    return Planes(high.clamp(-LEVELS, LEVELS).to(torch.int8), low.clamp(-LEVELS, LEVELS).to(torch.int8), scale)


class Stored:
    """The pool of a call: of floats or, where there are ``low`` and ``scale`` [S, H, E], in 8 bits."""

    def __init__(self, state: Tensor, low: Tensor | None = None, scale: Tensor | None = None) -> None:
        self._state = state
        self._planes = None if low is None or scale is None else Planes(state, low, scale[..., None, :])

    def read(self, slots: Tensor | None, dtype: torch.dtype, fresh: Tensor | None = None) -> Tensor:
        """[N, H, D, E] of dtype; zero for padding and where ``fresh``."""
        if self._planes is None:
            return pool.read(self._state, slots, dtype, fresh)
        high, low, scale = (pool.read(x, slots, dtype, fresh) for x in self._planes)
        return high * scale + low * (scale / PARTS)

    def seen(self, slots: Tensor | None, exact: Tensor) -> Tensor:
        """What a step reads in place of ``exact``, the states that ``read`` gave."""
        if self._planes is None:
            return exact
        high, _, scale = self._planes
        return pool.read(high, slots, exact.dtype) * pool.read(scale, slots, exact.dtype)

    def write(self, slots: Tensor | None, states: Tensor, changed: Tensor | None = None) -> None:
        """Write [N, H, D, E]; heads that are not ``changed`` [N, H] are as they were read. None: all are."""
        if self._planes is None:
            pool.write(self._state, slots, states)
            return
        for x, values in zip(self._planes, quantized(states), strict=True):
            if changed is not None:
                values = torch.where(changed[..., None, None], values, pool.read(x, slots, x.dtype))
            pool.write(x, slots, values)


def rows_of_prefill(
    slots: Tensor | None, cu_seqlens: Tensor, snapshot_at: Tensor | None, snapshot_slots: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A prefill works on floats, in a pool of its own: a row for each of N sequences, then one for each snapshot.

    Returns which rows of the pool in 8 bits these go to, -1: none, [N + N·P]; and the slots [N] and the snapshots'
    slots [N, P] in the pool of its own.
    """
    own = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    slots = own if slots is None else slots
    places = torch.where(slots < 0, -1, own)
    if snapshot_at is None or snapshot_slots is None:
        return slots, places, None
    taken = (snapshot_at >= 0) & (snapshot_at <= cu_seqlens.diff()[:, None]) & (slots >= 0)[:, None]
    taken &= snapshot_slots >= 0
    after = own.numel() + torch.arange(taken.numel(), device=own.device).view_as(taken)
    rows = torch.cat([slots, torch.where(taken, snapshot_slots, -1).flatten()])
    return rows, places, torch.where(taken, after, -1)


def quantize(states: Tensor, high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None) -> None:
    Stored(high, low, scale).write(slots, states)


def dequantize(high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None) -> Tensor:
    return Stored(high, low, scale).read(slots, torch.float32)
