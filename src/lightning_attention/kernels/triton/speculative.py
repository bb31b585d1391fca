"""Drafts: their outputs without touching the states, and the states after those that were accepted.

A tree whose drafts come depth first costs what a chain does: a draft that does not follow the one before it walks up
its ancestors, so the cost of a draft that starts a branch grows with its depth.
"""

import torch
from torch import Tensor

from lightning_attention.kernels.triton import dispatch, nvidia
from lightning_attention.kernels.triton.decode import columns, over_states
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.recurrent import commit_kernel, verify_kernel

NO_RING = (None, 0, 0, None, 0, 0, None, None, None, 0, 0)  # keys, values, counts, and the planes of a pool in 8 bits


@recorded
def verify(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
    slots: Tensor | None, parents: Tensor | None, scale: float, snapshots: Tensor | None = None,
    snapshot_slots: Tensor | None = None, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    (T, H, E), (_, Hk, D), N = v.shape, k.shape, cu_seqlens.shape[0] - 1
    TILE = columns(D, E, q.dtype, 1 if parents is None else 2)
    made = None if out is not None else torch.empty_like(v, memory_format=torch.contiguous_format)
    if T == 0:
        return made
    strides = state.stride()
    of_snapshots: tuple[int, ...] = (0, 0, 0, 0)
    P = 0
    if snapshots is not None and snapshot_slots is not None:
        of_snapshots, P = snapshots.stride(), snapshot_slots.shape[1]
    sizes = N, H, D, E, H // Hk
    before = (q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], out if made is None else made, state)
    slots, log_decay, cuts = dispatch.dense(slots), dispatch.dense(log_decay), cu_seqlens.contiguous()
    after = N, T, H, scale, int(made is not None)
    if snapshots is None and nvidia.takes_drafts(N, q, k, v, out, parents, state, None, None, None):
        args = (*before, *strides[:2], slots, log_decay, cuts, *NO_RING, *after)
        nvidia.verify(sizes, args, (None,), state)
        return made
    args = (
        *before, *strides, slots, log_decay, cuts, dispatch.dense(parents), *after, snapshots, *of_snapshots,
        dispatch.dense(snapshot_slots), P,
    )  # fmt: skip
    over_states(verify_kernel, sizes, args, state, strides, TILE, written=snapshots)
    return made


@recorded
def commit(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, accepted: Tensor,
    slots: Tensor | None,
) -> None:  # fmt: skip
    (T, H, E), (_, Hk, D), N = v.shape, k.shape, cu_seqlens.shape[0] - 1
    TILE = columns(D, E, k.dtype)
    if T == 0:
        return
    strides, sizes = state.stride(), (N, H, D, E, H // Hk)
    before = k, *k.stride()[:2], v, *v.stride()[:2], state
    after = dispatch.dense(slots), dispatch.dense(log_decay), cu_seqlens.contiguous(), accepted.contiguous()
    if nvidia.takes_accepted(N, k, v, state, None, None):
        nvidia.commit(sizes, (*before, *strides[:2], *after), (None,), state)
        return
    over_states(commit_kernel, sizes, (*before, *strides, *after, H), state, strides, TILE)
