"""Drafts: their outputs without touching the states, and the states after those that were accepted.

A tree whose drafts come depth first costs what a chain does: a draft that does not follow the one before it walks up
its ancestors, so the cost of a draft that starts a branch grows with its depth.
"""

import torch
from torch import Tensor

from lightning_attention.kernels.triton import launcher
from lightning_attention.kernels.triton.decode import columns, over_states
from lightning_attention.kernels.triton.step import commit_kernel, verify_kernel


@launcher.on_its_device
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
    T, H, D = q.shape
    E, N = v.shape[2], cu_seqlens.shape[0] - 1
    TE = columns(D, E, q.dtype, 1 if parents is None else 2)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if T == 0:
        return out
    cu_seqlens = cu_seqlens.contiguous()
    slots, parents, log_decay = map(launcher.dense, (slots, parents, log_decay))
    args = (
        q, k, v, out, state, cu_seqlens, slots, parents, log_decay, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *state.stride(), N, T, H, scale,
    )  # fmt: skip
    over_states(verify_kernel, N, args, state, TE, (q, cu_seqlens, log_decay, slots, parents))
    return out


@launcher.on_its_device
def commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    accepted: Tensor,
    slots: Tensor | None,
) -> None:
    T, H, D = k.shape
    E, N = v.shape[2], cu_seqlens.shape[0] - 1
    TE = columns(D, E, k.dtype)
    if T == 0:
        return
    cu_seqlens, accepted = cu_seqlens.contiguous(), accepted.contiguous()
    slots, log_decay = launcher.dense(slots), launcher.dense(log_decay)
    args = (
        k, v, state, cu_seqlens, accepted, slots, log_decay, *k.stride()[:2], *v.stride()[:2], *state.stride(), H,
    )  # fmt: skip
    over_states(commit_kernel, N, args, state, TE, (k, cu_seqlens, log_decay, slots))
