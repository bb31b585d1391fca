"""Rings of recent tokens beside a pool, in plain PyTorch: no count is looked at on the host.

A slot's ring has R places. ``count`` is how many tokens were appended since its row of the pool was last whole, less
multiples of R where it would reach 2 R; token i is at place i mod R. A head folds what it holds into its state whenever
(count + spread) mod R becomes 0, where spread goes from 0 to R − 1 over the heads: 1/R of a row is written in every
step, be it that of one sequence. So a head holds the last min(count, (count + spread) mod R) tokens: the first where
its last turn would have been before token 0, and never from R on. Nothing in this depends on the slot, and a row's
state, keys, values and count may be copied to another's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_attention.kernels import pool, quantized
from lightning_attention.kernels.decays import carried, rate_of
from lightning_attention.kernels.quantized import Stored

Run = Callable[..., Tensor | None]


class Rings(NamedTuple):
    """Rings [S, H, R, D], [S, H, R, E] with counts [S] of all slots, or of the N sequences of a call."""

    k: Tensor
    v: Tensor
    counts: Tensor


def _read(rings: Rings, slots: Tensor | None) -> Rings:
    """Those of the sequences; zero for padding."""
    k, v = (pool.read(x, slots, x.dtype) for x in rings[:2])
    counts = pool.read(rings.counts[:, None, None, None], slots, torch.int64).flatten()
    return Rings(k, v, counts)


def _write(rings: Rings, slots: Tensor | None, rows: Rings) -> None:
    for x, values in zip(rings, rows, strict=True):
        pool.write(x, slots, values)


def _since(rings: Rings, counts: Tensor) -> Tensor:
    """[N, H]: tokens since each head's last turn to fold, which may lie before token 0."""
    H, R = rings.k.shape[1:3]
    spread = torch.arange(H, device=counts.device) * R // H
    return (counts[:, None] + spread) % R


def _held(rings: Rings) -> Tensor:
    """[N, H]: how many tokens each head holds."""
    return torch.minimum(rings.counts[:, None], _since(rings, rings.counts))


def _whole(states: Tensor, rings: Rings, rate: Tensor, batch_invariant: bool = False) -> Tensor:
    """States [N, H, D, E] with what the sequences' rings hold folded in."""
    R, counts, held = rings.k.shape[2], rings.counts, _held(rings)
    age = (counts[:, None] - 1 - torch.arange(R, device=counts.device)) % R  # of each place, 0 for the newest token
    used = (age[:, None] < held[..., None])[..., None]  # [N, H, R, 1]
    weight = (rate[:, None, None] * age[:, None, :, None]).exp()
    # Replaced, not multiplied: a place that is not in use may hold anything.
    k = torch.where(used, rings.k.to(states.dtype), 0)
    v = torch.where(used, rings.v.to(states.dtype) * weight, 0)
    if batch_invariant:  # a matrix product may sum in an order that depends on the others
        new = torch.zeros_like(states)
        for place in range(R):
            new += k[:, :, place, :, None] * v[:, :, place, None, :]
    else:
        new = k.transpose(-1, -2) @ v
    return carried(rate, held, states, new)


def _append(rings: Rings, k: Tensor, v: Tensor, taken: Tensor) -> tuple[Rings, Tensor]:
    """Rings after a token of each sequence that is ``taken`` [N], and which heads [N, H] fold then."""
    R, counts = rings.k.shape[2], rings.counts
    here = taken[:, None] & (torch.arange(R, device=counts.device) == counts[:, None] % R)
    keys, values = (
        torch.where(here[:, None, :, None], x[:, :, None].to(ring.dtype), ring)
        for x, ring in ((k, rings.k), (v, rings.v))
    )
    counts = counts + taken
    folds = taken[:, None] & (_since(rings, counts) == 0)
    return Rings(keys, values, torch.where(counts == 2 * R, R, counts)), folds


def _places(slots: Tensor | None) -> Tensor | None:
    """The slots of a pool that has a row for each sequence of the call."""
    return None if slots is None else torch.where(slots < 0, -1, torch.arange(slots.numel(), device=slots.device))


def rows_of_prefill(
    slots: Tensor | None, fresh: Tensor | None, snapshot_slots: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which rows of a pool a prefill replaces, and which of them start from zero.

    Those of snapshots are among them, and are not said to be fresh: whether one is taken is not known here.
    """
    if slots is None or snapshot_slots is None:
        return slots, fresh
    rows = torch.cat([slots, snapshot_slots.flatten()])
    if fresh is None:
        return rows, None
    return rows, torch.cat([fresh, torch.zeros_like(snapshot_slots, dtype=torch.bool).flatten()])


class OverRings:
    """A backend's operations over states with rings, by its ``decode``, ``prefill`` and ``verify`` over states.

    ``low`` and ``state_scale``: of a pool in 8 bits. ``sums``: the type in which states and sums are computed for
    inputs like this one.
    """

    def __init__(self, decode: Run, prefill: Run, verify: Run, sums: Callable[[Tensor], torch.dtype]) -> None:
        self._decode, self._prefill, self._verify, self._sums = decode, prefill, verify, sums

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None,
        scale: float, batch_invariant: bool, ring_k: Tensor, ring_v: Tensor, count: Tensor, low: Tensor | None,
        state_scale: Tensor | None, out: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        stored, rings, rate = (
            Stored(state, low, state_scale), Rings(ring_k, ring_v, count), self._rate(log_decay, v, v.shape[1])
        )  # fmt: skip
        states, own, places = stored.read(slots, rate.dtype), _read(rings, slots), _places(slots)
        seen = stored.seen(slots, states)
        whole = _whole(seen, own, rate, batch_invariant)
        made = self._decode(q, k, v, log_decay, whole, places, scale, batch_invariant, out)
        if seen is not states:  # the output is of what is seen, and what is folded of all
            whole = _whole(states, own, rate, batch_invariant)
            self._decode(q, k, v, log_decay, whole, places, scale, batch_invariant, None)
        own, folds = _append(own, pool.repeated(k, v), v, torch.ones_like(own.counts, dtype=torch.bool))
        stored.write(slots, torch.where(folds[..., None, None], whole, states), folds)
        _write(rings, slots, own)
        return made

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
        slots: Tensor | None, fresh: Tensor | None, scale: float, snapshot_at: Tensor | None,
        snapshot_slots: Tensor | None, batch_invariant: bool, ring_k: Tensor | None, ring_v: Tensor | None,
        count: Tensor | None, low: Tensor | None, state_scale: Tensor | None, out: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """From whole states, and to them: no ring must outlive the state that it belongs to."""
        rings = None if ring_k is None or ring_v is None or count is None else Rings(ring_k, ring_v, count)
        if low is not None:
            return self._prefill_over_copies(
                q, k, v, log_decay, Stored(state, low, state_scale), rings, cu_seqlens, slots, fresh, scale,
                snapshot_at, snapshot_slots, batch_invariant, out,
            )  # fmt: skip
        assert rings is not None
        self.fold(state, log_decay, *rows_of_prefill(slots, fresh, snapshot_slots), *rings, None, None)
        return self._prefill(
            q, k, v, log_decay, state, cu_seqlens, slots, fresh, scale, snapshot_at, snapshot_slots, batch_invariant,
            out,
        )  # fmt: skip

    def _prefill_over_copies(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, stored: Stored, rings: Rings | None,
        cu_seqlens: Tensor, slots: Tensor | None, fresh: Tensor | None, scale: float, snapshot_at: Tensor | None,
        snapshot_slots: Tensor | None, batch_invariant: bool, out: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """In floats, so that a state in 8 bits is rounded once."""
        rate = self._rate(log_decay, v, v.shape[1])
        rows, places, snapshots = quantized.rows_of_prefill(slots, cu_seqlens, snapshot_at, snapshot_slots)
        states = stored.read(slots, rate.dtype, fresh)
        if rings is not None:
            whole = _whole(states, _read(rings, slots), rate)
            states = whole if fresh is None else torch.where(fresh[:, None, None, None], states, whole)
            pool.write(rings.counts, rows, torch.zeros_like(rows))
        states = torch.cat([states, states.new_zeros(len(rows) - len(places), *states.shape[1:])])
        made = self._prefill(
            q, k, v, log_decay, states, cu_seqlens, places, None, scale, snapshot_at, snapshots, batch_invariant, out
        )
        stored.write(rows, states)
        return made

    def verify(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
        slots: Tensor | None, parents: Tensor | None, scale: float, ring_k: Tensor, ring_v: Tensor, count: Tensor,
        low: Tensor | None, state_scale: Tensor | None, out: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        rate, stored = self._rate(log_decay, v, v.shape[1]), Stored(state, low, state_scale)
        seen = stored.seen(slots, stored.read(slots, rate.dtype))
        whole = _whole(seen, _read(Rings(ring_k, ring_v, count), slots), rate)
        return self._verify(q, k, v, log_decay, whole, cu_seqlens, _places(slots), parents, scale, None, None, out)

    def commit(
        self, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, accepted: Tensor,
        slots: Tensor | None, ring_k: Tensor, ring_v: Tensor, count: Tensor, low: Tensor | None,
        state_scale: Tensor | None,
    ) -> None:  # fmt: skip
        """One after the other, as decode appends them."""
        if k.shape[0] == 0:
            return
        k, rings, rate = pool.repeated(k, v), Rings(ring_k, ring_v, count), self._rate(log_decay, v, v.shape[1])
        stored = Stored(state, low, state_scale)
        states, own = stored.read(slots, rate.dtype), _read(rings, slots)
        whole, changed = _whole(states, own, rate), torch.zeros_like(_held(own), dtype=torch.bool)
        order, packed = pool.packed_together(accepted, cu_seqlens)
        lengths = packed.diff()
        # On the CPU the most that were accepted bound the loop; elsewhere they are not read.
        steps = int(lengths.max()) if k.device.type == "cpu" else k.shape[0]
        for step in range(steps):
            taken = step < lengths
            token = order[(packed[:-1] + step).clamp(max=k.shape[0] - 1)]
            new = k[token].to(rate.dtype)[..., None] * v[token].to(rate.dtype)[..., None, :]
            whole = torch.where(taken[:, None, None, None], carried(rate, 1, whole, new), whole)
            own, folds = _append(own, k[token], v[token], taken)
            states, changed = torch.where(folds[..., None, None], whole, states), changed | folds
        stored.write(slots, states, changed)
        _write(rings, slots, own)

    def fold(
        self, state: Tensor, log_decay: Tensor | None, slots: Tensor | None, fresh: Tensor | None, ring_k: Tensor,
        ring_v: Tensor, count: Tensor, low: Tensor | None, state_scale: Tensor | None,
    ) -> None:  # fmt: skip
        rings, rate = Rings(ring_k, ring_v, count), self._rate(log_decay, ring_v, state.shape[1])
        stored = Stored(state, low, state_scale)
        states, own = stored.read(slots, rate.dtype), _read(rings, slots)
        folds = _held(own) > 0
        if fresh is not None:
            folds &= ~fresh[:, None]
        stored.write(slots, torch.where(folds[..., None, None], _whole(states, own, rate), states), folds)
        pool.write(rings.counts, slots, torch.zeros_like(own.counts))

    def _rate(self, log_decay: Tensor | None, like: Tensor, H: int) -> Tensor:
        return rate_of(log_decay, H, self._sums(like), like.device)
