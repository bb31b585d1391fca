"""Drafts: their outputs without touching the states, and the states after those that were accepted.

A tree whose drafts come depth first costs what a chain does: a draft that does not follow the one before it walks up
its ancestors, so the cost of a draft that starts a branch grows with its depth.
"""

import torch
from torch import Tensor

from lightning_attention.kernels.triton import launch
from lightning_attention.kernels.triton.decode import aligned, columns, constants
from lightning_attention.kernels.triton.step import commit_kernel, verify_kernel


@launch.on_its_device
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
    cu_seqlens, slots = cu_seqlens.contiguous(), _dense(slots)
    parents, log_decay = _dense(parents), _dense(log_decay)
    sizes = D, E, TE, aligned(state)
    args = (
        q, k, v, out, state, cu_seqlens, slots, parents, log_decay, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *state.stride(), N, T, H, scale,
    )  # fmt: skip
    key = (
        q.get_device(), q.dtype, state.dtype, sizes, cu_seqlens.dtype, log_decay is None, _dtype(slots),
        _dtype(parents),
    )  # fmt: skip
    launch.run(verify_kernel, (N * H * -(-E // TE), 1, 1), args, key, lambda: constants(*sizes))
    return out


def commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    accepted: Tensor,
    slots: Tensor | None,
) -> None:
    _commit(state, k, v, log_decay, cu_seqlens, accepted, slots)


@launch.on_its_device
def _commit(
    state: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
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
    slots, log_decay = _dense(slots), _dense(log_decay)
    sizes = D, E, TE, aligned(state)
    args = (
        k, v, state, cu_seqlens, accepted, slots, log_decay, *k.stride()[:2], *v.stride()[:2], *state.stride(), H,
    )  # fmt: skip
    key = (
        k.get_device(), k.dtype, state.dtype, sizes, cu_seqlens.dtype, log_decay is None, _dtype(slots),
    )  # fmt: skip
    launch.run(commit_kernel, (N * H * -(-E // TE), 1, 1), args, key, lambda: constants(*sizes))


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dtype(x: Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype
