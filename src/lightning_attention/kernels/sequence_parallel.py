"""Slices of sequences on several ranks, by what any backend has: ``states``, then ``attention`` from what was gathered.

With L_r the state that slice r leaves when it starts from zero, n_r its length and S_0 the initial state, rank r starts
from S_r, where

    S_{r+1} = λ^{n_r} S_r + L_r

so L and n of every rank, a state and a number per sequence whatever the length, tell each its S_r. Backward is the same
with time reversed: with G_r the gradient of S_r through the outputs of slice r alone, the gradient A_r of the state
after slice r is

    A_{r-1} = λ^{n_r} A_r + G_r,    from A_{R-1} = Σ over ranks of the gradient of the final state.

Everything else is the ordinary operation from S_r, and its ordinary backward with A_r as its final state's gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_attention.kernels.backend import Ranks


def powers(log_decay: Tensor | None, lengths: Tensor, H: int) -> Tensor:
    """λ^n: lengths [R, N] -> [R, N, H, 1, 1]; λ^0 is 1, also where λ is 0."""
    rate = lengths.new_zeros(H) if log_decay is None else log_decay.to(lengths.dtype)
    rate = rate.clamp(min=torch.finfo(rate.dtype).min)
    return (lengths[..., None] * rate).exp()[..., None, None]


def _gathered(message: Tensor, ranks: Ranks) -> Tensor:
    """[ranks, *message.shape]."""
    gathered = message.new_empty(ranks.size * message.shape[0], *message.shape[1:])
    ranks.gather(message, gathered)()
    return gathered.view(ranks.size, *message.shape)


def sequence_parallel(
    states: Callable[..., Tensor], attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    output_final_state: bool, batch_invariant: bool, ranks: Ranks,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """``Backend.sequence_parallel``, by its other functions."""
    own = states(k, v, log_decay, cu_seqlens, False, batch_invariant)
    lengths = own.new_full(own.shape[:1], k.shape[1]) if cu_seqlens is None else cu_seqlens.diff().to(own.dtype)
    gathered = _gathered(torch.cat([own.flatten(), lengths]), ranks)
    left, lengths = gathered.split([own.numel(), lengths.numel()], 1)
    lengths = lengths.clone(memory_format=torch.contiguous_format)
    factors = powers(log_decay, lengths, own.shape[1])
    start = torch.zeros_like(own) if initial_state is None else initial_state.clone()
    for r in range(ranks.rank):
        start = torch.addcmul(left[r].view_as(own), factors[r], start)
    final = start
    for r in range(ranks.rank, ranks.size if output_final_state else 0):
        final = torch.addcmul(left[r].view_as(own), factors[r], final)
    out, _ = attention(q, k, v, log_decay, start, cu_seqlens, scale, False, batch_invariant)
    return out, final if output_final_state else None, start, lengths


def sequence_parallel_backward(
    states: Callable[..., Tensor], attention_backward: Callable[..., Any], dout: Tensor, dfinal: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, start: Tensor, cu_seqlens: Tensor | None,
    lengths: Tensor, scale: float, batch_invariant: bool, need_dlog_decay: bool, ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """``Backend.sequence_parallel_backward``, by its other functions."""
    own = scale * states(q, dout, log_decay, cu_seqlens, True, batch_invariant)
    gathered = _gathered(torch.stack([own] if dfinal is None else [own, dfinal]), ranks)
    factors = powers(log_decay, lengths, own.shape[1])
    dend = torch.zeros_like(own) if dfinal is None else gathered[:, 1].sum(0)
    for r in range(ranks.size - 1, ranks.rank, -1):
        dend = torch.addcmul(gathered[r, 0], factors[r], dend)
    return attention_backward(
        dout, dend, q, k, v, log_decay, start, cu_seqlens, scale, batch_invariant, need_dlog_decay
    )
