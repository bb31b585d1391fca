"""Drafts: their outputs without touching the states, and the states after those that were accepted."""

import torch
from torch import Tensor

from lightning_attention.kernels.tiled import pool
from lightning_attention.kernels.tiled.attention import attention


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    parents: Tensor | None,
    scale: float,
) -> Tensor:
    start = pool.read(state, slots)
    if parents is None:
        out = attention(q[None], k[None], v[None], log_decay, start, cu_seqlens, scale, False, False)[0][0]
    else:
        out = _tree(q, k, v, log_decay, start, cu_seqlens, parents, scale)
    return pool.mask_padding_tokens(out, slots, cu_seqlens)


def _tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    start: Tensor,
    cu_seqlens: Tensor,
    parents: Tensor,
    scale: float,
) -> Tensor:
    """Walk every draft up to its root at once, one ancestor a step."""
    (T, H), dtype = k.shape[:2], v.dtype
    q, k, v = (x.float() for x in (q, k, v))
    rate = q.new_zeros(H) if log_decay is None else log_decay.float()
    token = torch.arange(T, device=q.device)
    sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(max=cu_seqlens.numel() - 2)
    first = cu_seqlens[sequence].long()
    up = torch.where(parents < 0, -1, first + parents)  # the parent among all T, or -1
    inside = token < cu_seqlens[-1]

    out = torch.zeros_like(v)
    depth = torch.zeros_like(token)
    at = torch.where(inside, token, -1)
    # On the CPU the longest sequence bounds the walk; elsewhere its length is not read.
    steps = int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" else T
    for step in range(steps):
        here = at >= 0
        near = at.clamp(min=0)
        weight = (q * k[near]).sum(-1) * (rate * step).exp()
        out += torch.where(here[:, None, None], weight[..., None] * v[near], 0)
        depth += here
        at = torch.where(here, up[near], -1)
    # q S of each sequence by an outer loop would read the lengths; [T, H, D, E] at once would not be linear in memory.
    from_state = torch.stack([(q[:, h, None] @ _rows(start, sequence, h)).squeeze(1) for h in range(H)], 1)
    out += (rate * depth[:, None]).exp()[..., None] * from_state
    return torch.where(inside[:, None, None], scale * out, 0).to(dtype)


def _rows(start: Tensor, sequence: Tensor, head: int) -> Tensor:
    return start[:, head].index_select(0, sequence)


def commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    accepted: Tensor,
    slots: Tensor | None,
) -> None:
    # Move the accepted drafts together, in order: the rest, and tokens past c_N, become padding past the last sequence.
    order = (~accepted).int().argsort(stable=True)
    count = torch.cat([accepted.new_zeros(1, dtype=torch.long), accepted.long().cumsum(0)])
    packed = count[cu_seqlens.long()]
    start = pool.read(state, slots)
    _, final = attention(None, k[None, order], v[None, order], log_decay, start, packed, 1.0, True, False)
    assert final is not None
    pool.write(state, slots, final)
