"""``lightning_attention`` over slices of sequences, a slice a rank: its forward and backward passes."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_attention.distributed import sequence_parallel as ranks
from lightning_attention.ops.attention import attention, attention_backward
from lightning_attention.ops.states import states


class SequenceParallel(torch.autograd.Function):
    """``attention`` with a group, its arguments checked."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None,
        cu_seqlens: Tensor | None, scale: float, output_final_state: bool, batch_invariant: bool, backend: str,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not isinstance(group, ProcessGroup):
            raise TypeError(
                f"group is a {type(group).__name__}; it must be a torch.distributed ProcessGroup that this process is "
                "in (of a DeviceMesh: mesh.get_group('sp'))"
            )
        own = states(k, v, log_decay, cu_seqlens, False, batch_invariant, backend)
        # Lengths travel as floats: past 2^24 tokens they round as λ^n itself does.
        lengths = own.new_full(own.shape[:1], k.shape[1]) if cu_seqlens is None else cu_seqlens.diff().to(own.dtype)
        start, final, powers = ranks.starting_state(own, lengths, log_decay, initial_state, group, output_final_state)
        out, _ = attention(q, k, v, log_decay, start, cu_seqlens, scale, False, batch_invariant, backend)
        ctx.save_for_backward(q, k, v, log_decay, start, cu_seqlens, powers)
        ctx.options = scale, output_final_state, batch_invariant, backend, group
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, start, cu_seqlens, powers = ctx.saved_tensors
        scale, has_final, batch_invariant, backend, group = ctx.options
        need_dlog_decay, need_dinitial = ctx.needs_input_grad[3:5]
        grad = scale * states(q, dout, log_decay, cu_seqlens, True, batch_invariant, backend)
        # dfinal is zeros where this rank's loss left the final state out, but what travels is the same on every rank.
        dend = ranks.gradient_of_end(grad, dfinal if has_final else None, powers, group)
        dq, dk, dv, dlog_decay, dstart = attention_backward(
            dout, dend, q, k, v, log_decay, start, cu_seqlens, scale, batch_invariant, need_dlog_decay, backend
        )
        # Only the first slice starts from the initial state: the other ranks' share of its gradient is zero.
        dinitial = None
        if need_dinitial:
            dinitial = dstart if ranks.is_first(group) else torch.zeros_like(start)
        return dq, dk, dv, dlog_decay if need_dlog_decay else None, dinitial, *(None,) * 6
