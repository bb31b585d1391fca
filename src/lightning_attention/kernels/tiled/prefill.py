"""Packed sequences that start from, and leave, their states in a pool."""

import torch
from torch import Tensor

from lightning_attention.kernels import pool
from lightning_attention.kernels.decays import carried, rate_of
from lightning_attention.kernels.tiled.attention import attention
from lightning_attention.kernels.tiled.states import states


def prefill(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, slots: Tensor | None,
    fresh: Tensor | None, scale: float, snapshot_at: Tensor | None, snapshot_slots: Tensor | None,
    batch_invariant: bool, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    start = pool.read(state, slots, pool.accumulator(v), fresh)
    found, final = attention(q[None], k[None], v[None], log_decay, start, cu_seqlens, scale, True, batch_invariant)
    assert final is not None
    pool.write(state, slots, final)
    if snapshot_at is not None and snapshot_slots is not None:
        wanted = snapshot_slots if slots is None else torch.where(slots[:, None] < 0, -1, snapshot_slots)
        take = _snapshots_as_of_calls if batch_invariant else _snapshots
        take(k, v, log_decay, state, start, cu_seqlens, snapshot_at, wanted)
    return pool.deliver(found[0], v, slots, cu_seqlens, out)


def _snapshots(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, start: Tensor, cu_seqlens: Tensor, at: Tensor,
    slots: Tensor,
) -> None:  # fmt: skip
    """Cut every sequence at its P snapshots, take the state of each cut by itself, and join them in order."""
    lengths = cu_seqlens.diff()
    slots = torch.where((at >= 0) & (at <= lengths[:, None]), slots, -1)
    at, order = torch.minimum(at.clamp(min=0), lengths[:, None]).long().sort(1)
    slots = slots.gather(1, order)
    N, P = at.shape
    first = cu_seqlens[:-1, None]
    cuts = torch.cat([first, first + at], 1).flatten()
    cuts = torch.cat([cuts, cu_seqlens[-1:]])  # cut P of a sequence, from its last snapshot to its end, is not needed
    own = states(k[None], v[None], log_decay, cuts, False, False).unflatten(0, (N, P + 1))
    rate = rate_of(log_decay, v.shape[1], start.dtype, start.device)
    steps = torch.cat([at[:, :1], at.diff(dim=1)], 1)
    rows = start
    for p in range(P):
        rows = carried(rate, steps[:, p, None], rows, own[:, p])
        pool.write(state, slots[:, p], rows)


def _snapshots_as_of_calls(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, start: Tensor, cu_seqlens: Tensor, at: Tensor,
    slots: Tensor,
) -> None:  # fmt: skip
    """Each with the bits that a call would leave which ended there: the sweep of it is made again."""
    sequence, lengths = pool.sequence_of(cu_seqlens, k.shape[0]), cu_seqlens.diff()
    place = torch.arange(k.shape[0], device=k.device) - cu_seqlens[sequence]
    for tokens, to in zip(at.unbind(1), slots.unbind(1), strict=True):
        order, packed = pool.packed_together((place >= 0) & (place < tokens[sequence]), cu_seqlens)
        keys, values = k[None, order], v[None, order]
        _, rows = attention(keys, keys, values, log_decay, start, packed, 1.0, True, True)
        assert rows is not None
        pool.write(state, torch.where((tokens >= 0) & (tokens <= lengths), to, -1), rows)
