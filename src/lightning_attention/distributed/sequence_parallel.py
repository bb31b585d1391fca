"""Sequence parallelism: every rank holds a slice of each sequence, and only states travel (LASP-2, arXiv 2502.07563).

With L_r the state that slice r leaves when it starts from zero, n_r its length and S_0 the initial state, rank r starts
from S_r, where

    S_{r+1} = λ^{n_r} S_r + L_r

so one all-gather of L and n, a state and a number per sequence whatever the length, tells every rank its S_r. Backward
is the same with time reversed: with G_r the gradient of S_r through the outputs of slice r alone, the gradient A_r of
the state after slice r is

    A_{r-1} = λ^{n_r} A_r + G_r,    from A_{R-1} = Σ over ranks of the gradient of the final state.

Everything else is the ordinary operation from S_r, and its ordinary backward with A_r as its final state's gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_attention.ops import backends, validation

_library = torch.library.Library("lightning_attention", "FRAGMENT")
_library.define(
    "slice_state(Tensor k, Tensor v, Tensor? log_decay, Tensor? cu_seqlens, bool reverse, bool batch_invariant, "
    "str backend) -> Tensor"
)


def _slice_state(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    batch_invariant: bool,
    backend: str,
) -> Tensor:
    """Σ_t λ^{n-1-t} k_tᵀ v_t over t = 0 … n-1 of each slice, [N, H, D, E]; ``reverse``: Σ_t λ^t k_tᵀ v_t."""
    validation.check_cu_seqlens_values(cu_seqlens, k.shape[1])
    validation.check_log_decay_values(log_decay)
    with torch.autocast(k.device.type, enabled=False):  # it would round decays and states
        return backends.get(backend).states(k, v, log_decay, cu_seqlens, reverse, batch_invariant)


def _slice_state_fake(k: Tensor, v: Tensor, log_decay: Any, cu_seqlens: Tensor | None, *others: Any) -> Tensor:  # noqa: ARG001
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(N, *k.shape[2:], v.shape[3], dtype=validation.state_dtype(k))


_library.impl("slice_state", _slice_state, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_attention::slice_state", _slice_state_fake, lib=_library)


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    # Of the public collectives, the one that torch 2.10 to 2.13 all have without a warning and torch.compile can trace.
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x, group=group)
    return gathered


def _powers(log_decay: Tensor | None, lengths: Tensor, H: int) -> Tensor:
    """λ^n: lengths [R, N] -> [R, N, H, 1, 1]."""
    rate = lengths.new_zeros(H) if log_decay is None else log_decay.to(lengths.dtype)
    return (lengths[..., None] * rate).exp()[..., None, None]


class SequenceParallel(torch.autograd.Function):
    """``lightning_attention`` with a group, its arguments checked; a final state not asked for has no elements."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        output_final_state: bool,
        batch_invariant: bool,
        backend: str,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group is a {type(group).__name__}; it must be a torch.distributed ProcessGroup that this process is "
                "in (of a DeviceMesh: mesh.get_group('sp'))"
            )
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        own = torch.ops.lightning_attention.slice_state(k, v, log_decay, cu_seqlens, False, batch_invariant, backend)
        # Lengths travel as floats: past 2^24 tokens they round as λ^n itself does.
        n = own.new_full(own.shape[:1], k.shape[1]) if cu_seqlens is None else cu_seqlens.diff().to(own.dtype)
        gathered = _all_gather(torch.cat([own.flatten(1), n[:, None]], 1), group)
        powers = _powers(log_decay, torch.stack([x[:, -1] for x in gathered]), own.shape[1])
        state = start = torch.zeros_like(own) if initial_state is None else initial_state
        for r in range(size if output_final_state else rank):
            state = torch.addcmul(gathered[r][:, :-1].view_as(own), powers[r], state)
            if r == rank - 1:
                start = state
        out, _ = torch.ops.lightning_attention.attention(
            q, k, v, log_decay, start, cu_seqlens, scale, False, batch_invariant, backend
        )
        ctx.save_for_backward(q, k, v, log_decay, start, cu_seqlens, powers)
        ctx.scale, ctx.has_final, ctx.batch_invariant = scale, output_final_state, batch_invariant
        ctx.backend, ctx.group = backend, group
        return out, state if output_final_state else state.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, start, cu_seqlens, powers = ctx.saved_tensors
        rank, size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        # Reversed, the state's weights are λ^t where the outputs saw λ^(t+1).
        grad = torch.ops.lightning_attention.slice_state(
            q, dout, log_decay, cu_seqlens, True, ctx.batch_invariant, ctx.backend
        )
        grad = grad * ctx.scale
        if log_decay is not None:
            grad = grad * log_decay.to(grad.dtype).exp()[:, None, None]
        # dfinal is zeros where this rank's loss left the final state out, but what travels is the same on every rank.
        gathered = _all_gather(torch.stack([grad, dfinal] if ctx.has_final else [grad]), ctx.group)
        dend = torch.stack([x[1] for x in gathered]).sum(0) if ctx.has_final else torch.zeros_like(grad)
        for r in range(size - 1, rank, -1):
            dend = torch.addcmul(gathered[r][0], powers[r], dend)
        need_dlog_decay = ctx.needs_input_grad[3]
        dq, dk, dv, dlog_decay, dstart = torch.ops.lightning_attention.attention_backward(
            dout, dend, q, k, v, log_decay, start, cu_seqlens, ctx.scale, ctx.batch_invariant, need_dlog_decay,
            ctx.backend,
        )  # fmt: skip
        # Only the first slice starts from the initial state: the other ranks' share of its gradient is zero.
        dinitial = None
        if ctx.needs_input_grad[4]:
            dinitial = dstart if rank == 0 else torch.zeros_like(start)
        return dq, dk, dv, dlog_decay if need_dlog_decay else None, dinitial, *(None,) * 6
