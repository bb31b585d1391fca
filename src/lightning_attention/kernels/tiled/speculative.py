"""Drafts: their outputs without touching the states, and the states after those that were accepted."""

import torch
from torch import Tensor

from lightning_attention.kernels import pool
from lightning_attention.kernels.decays import carried, rate_of
from lightning_attention.kernels.tiled.states import states


def verify(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, slots: Tensor | None,
    parents: Tensor | None, scale: float, snapshots: Tensor | None = None, snapshot_slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Walk every draft up to its root at once, one ancestor a step.

    Not as ``attention`` computes a chain, by a masked product: a NaN in one draft would reach the good ones before it.
    """
    q, k = pool.repeated(q, v), pool.repeated(k, v)
    dtype = pool.accumulator(v)
    start = pool.read(state, slots, dtype)
    token, sequence = torch.arange(k.shape[0], device=k.device), pool.sequence_of(cu_seqlens, k.shape[0])
    first = cu_seqlens[sequence].long()
    parent = token - first - 1 if parents is None else parents
    up = torch.where(parent < 0, -1, first + parent)  # the parent among all T, or -1
    inside = token < cu_seqlens[-1]

    results, (qs, ks, vs) = torch.zeros(v.shape, dtype=dtype, device=v.device), (x.to(dtype) for x in (q, k, v))
    rate = rate_of(log_decay, k.shape[1], dtype, k.device)
    depth = torch.zeros_like(token)
    at = torch.where(inside, token, -1)
    after = None if snapshots is None else torch.zeros(k.shape[0], *start.shape[1:], dtype=dtype, device=v.device)
    # On the CPU the longest sequence bounds the walk; elsewhere its length is not read.
    steps = int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" else k.shape[0]
    for step in range(steps):
        here = at >= 0
        near = at.clamp(min=0)
        left = (rate * step).exp()
        weight = (qs * ks[near]).sum(-1) * left
        results += torch.where(here[:, None, None], weight[..., None] * vs[near], 0)
        if after is not None:
            added = (ks[near] * left[:, None])[..., None] * vs[near][..., None, :]
            after += torch.where(here[:, None, None, None], added, 0)
        depth += here
        at = torch.where(here, up[near], -1)
    # q S of each sequence by an outer loop would read the lengths; [T, H, D, E] at once would not be linear in memory.
    from_state = [(qs[:, h, None] @ _rows(start, sequence, h)).squeeze(1) for h in range(k.shape[1])]
    left = (rate * depth[:, None]).exp()[..., None]
    results += left * torch.stack(from_state, 1)
    if after is not None and snapshots is not None and snapshot_slots is not None:
        after += left[..., None] * start.index_select(0, sequence)
        pool.write_after_drafts(snapshots, snapshot_slots, slots, cu_seqlens, after)
    found = torch.where(inside[:, None, None], scale * results, 0)
    return pool.deliver(found, v, slots, cu_seqlens, out)


def _rows(start: Tensor, sequence: Tensor, head: int) -> Tensor:
    return start[:, head].index_select(0, sequence)


def commit(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, accepted: Tensor,
    slots: Tensor | None,
) -> None:  # fmt: skip
    order, packed = pool.packed_together(accepted, cu_seqlens)
    new = states(k[None, order], v[None, order], log_decay, packed, False, False)
    rate = rate_of(log_decay, v.shape[1], new.dtype, new.device)
    pool.write(state, slots, carried(rate, packed.diff()[:, None], pool.read(state, slots, new.dtype), new))
