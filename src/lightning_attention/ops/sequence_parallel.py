"""``lightning_attention`` over slices of sequences, a slice a rank: its forward and backward passes.

Both are operators with a collective within, so that compiled and eager calls are one.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_attention.distributed.sequence_parallel import Ranks, check_group
from lightning_attention.kernels import sequence_parallel as plain
from lightning_attention.ops import backends, validation
from lightning_attention.ops.attention import gradient_of_decay, new_states
from lightning_attention.ops.operation import Operation, absent


def _sequence_parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, batch_invariant: bool, backend: str, group: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """``group``: its name. Results are those of ``Backend.sequence_parallel``."""
    validation.check_cu_seqlens_values(cu_seqlens, q.shape[1])
    validation.check_log_decay_values(log_decay)
    chosen = backends.get(backend)
    run = chosen.sequence_parallel or partial(plain.sequence_parallel, chosen.states, chosen.attention)
    return run(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant, Ranks.of(group)
    )


def _sequence_parallel_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, _, _, cu_seqlens, _, output_final_state, *_, group = inputs
    start = new_states(k, v, cu_seqlens)
    final = start.new_empty(start.shape) if output_final_state else absent(q)
    return v.new_empty(v.shape), final, start, start.new_empty(Ranks.of(group).size, start.shape[0])


def _sequence_parallel_backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, start: Tensor,
    cu_seqlens: Tensor | None, lengths: Tensor, scale: float, batch_invariant: bool, need_dlog_decay: bool,
    backend: str, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    chosen = backends.get(backend)
    run = chosen.sequence_parallel_backward or partial(
        plain.sequence_parallel_backward, chosen.states, chosen.attention_backward
    )
    dq, dk, dv, dlog_decay, dstart = run(
        dout, dfinal, q, k, v, log_decay, start, cu_seqlens, lengths, scale, batch_invariant, need_dlog_decay,
        Ranks.of(group),
    )  # fmt: skip
    return dq, dk, dv, gradient_of_decay(dlog_decay, log_decay, need_dlog_decay), dstart


def _sequence_parallel_backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    dout, _, q, k, v, log_decay, start, *_, need_dlog_decay, _, _ = inputs
    like = q, k, v, log_decay if need_dlog_decay else None, start
    return tuple(absent(dout) if x is None else x.new_empty(x.shape) for x in like)


sequence_parallel = Operation(_sequence_parallel, _sequence_parallel_fake)
sequence_parallel_backward = Operation(_sequence_parallel_backward, _sequence_parallel_backward_fake)


def attention_over_ranks(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    """``attention`` with a group, the last argument; the others are checked."""
    *rest, group = inputs
    check_group(group)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in rest[:5]):
        return _SequenceParallel.apply(*inputs)
    out, final, *_ = sequence_parallel(*rest, group.group_name)
    return out, final


class _SequenceParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None,
        cu_seqlens: Tensor | None, scale: float, output_final_state: bool, batch_invariant: bool, backend: str,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        out, final, start, lengths = sequence_parallel(
            q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant, backend,
            group.group_name,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, log_decay, start, cu_seqlens, lengths)
        ctx.options = scale, output_final_state, batch_invariant, backend, group
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, has_final, batch_invariant, backend, group = ctx.options
        need_dlog_decay, need_dinitial = ctx.needs_input_grad[3:5]
        # dfinal is zeros where this rank's loss left the final state out, but what travels is the same on every rank.
        dq, dk, dv, dlog_decay, dstart = sequence_parallel_backward(
            dout, dfinal if has_final else None, *ctx.saved_tensors, scale, batch_invariant, need_dlog_decay, backend,
            group.group_name,
        )  # fmt: skip
        # Only the first slice starts from the initial state: the other ranks' share of its gradient is zero.
        dinitial = None
        if need_dinitial:
            dinitial = dstart if dist.get_rank(group) == 0 else torch.zeros_like(dstart)
        return dq, dk, dv, dlog_decay if need_dlog_decay else None, dinitial, *(None,) * 6
