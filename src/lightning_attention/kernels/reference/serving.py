"""The operations over a pool of states, token by token in float64."""

import torch
from torch import Tensor

from lightning_attention.kernels import pool
from lightning_attention.kernels.reference.attention import recurrence


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float,
    batch_invariant: bool, out: Tensor | None = None,  # noqa: ARG001
) -> Tensor | None:  # fmt: skip
    start = pool.read(state, slots, torch.float64)
    found, final = recurrence(q[:, None], k[:, None], v[:, None], log_decay, start, None, scale)
    pool.write(state, slots, final)
    return pool.deliver(found[:, 0], v, slots, None, out)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, slots: Tensor | None,
    fresh: Tensor | None, scale: float, snapshot_at: Tensor | None, snapshot_slots: Tensor | None,
    batch_invariant: bool, out: Tensor | None = None,  # noqa: ARG001
) -> Tensor | None:  # fmt: skip
    start, sequence = pool.read(state, slots, torch.float64, fresh), pool.sequence_of(cu_seqlens, k.shape[0])
    found, final = recurrence(q[None], k[None], v[None], log_decay, start, cu_seqlens, scale)
    pool.write(state, slots, final)
    if snapshot_at is not None and snapshot_slots is not None:
        place = torch.arange(k.shape[0], device=k.device) - cu_seqlens[sequence]
        for at, to in zip(snapshot_at.unbind(1), snapshot_slots.unbind(1), strict=True):
            wanted = (at >= 0) & (at <= cu_seqlens.diff())
            if slots is not None:
                wanted &= slots >= 0
            snapshot = _after(place < at[sequence], k, v, log_decay, start, cu_seqlens)
            pool.write(state, torch.where(wanted, to, -1), snapshot)
    return pool.deliver(found[0], v, slots, cu_seqlens, out)


def verify(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, slots: Tensor | None,
    parents: Tensor | None, scale: float, snapshots: Tensor | None = None, snapshot_slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    q, k = pool.repeated(q, v), pool.repeated(k, v)
    start, sequence = pool.read(state, slots, torch.float64), pool.sequence_of(cu_seqlens, k.shape[0])
    first = cu_seqlens[sequence]
    parent = torch.arange(k.shape[0], device=k.device) - first - 1 if parents is None else parents
    decay = torch.ones_like(start[0, :, :1, :1]) if log_decay is None else log_decay.double().exp()[:, None, None]
    before = start.index_select(0, sequence)  # of each draft [T, H, D, E], and after it
    after = torch.zeros_like(before)
    for t in range(k.shape[0]):
        above = after.index_select(0, (first + parent)[t : t + 1].clamp(0, k.shape[0] - 1))
        root = torch.where(parent[t] < 0, before[t], above[0])
        after[t] = decay * root + k[t].double()[..., None] * v[t].double()[..., None, :]
    if snapshots is not None and snapshot_slots is not None:
        pool.write_after_drafts(snapshots, snapshot_slots, slots, cu_seqlens, after)
    found = scale * (q.double()[..., None, :] @ after).squeeze(-2)
    inside = torch.arange(k.shape[0], device=k.device) < cu_seqlens[-1]
    return pool.deliver(torch.where(inside[:, None, None], found, 0), v, slots, cu_seqlens, out)


def commit(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, accepted: Tensor,
    slots: Tensor | None,
) -> None:  # fmt: skip
    start = pool.read(state, slots, torch.float64)
    pool.write(state, slots, _after(accepted, k, v, log_decay, start, cu_seqlens))


def _after(taken: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, start: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The states [N, H, D, E] after those tokens of each sequence that are ``taken`` [T]."""
    order, packed = pool.packed_together(taken, cu_seqlens)
    return recurrence(k[None, order], k[None, order], v[None, order], log_decay, start, packed, 1.0)[1]
