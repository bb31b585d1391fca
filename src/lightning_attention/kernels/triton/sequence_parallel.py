"""Slices of sequences on several ranks: what is launched before and after states are gathered.

One pass over k and v gives both what a slice leaves and the states between its segments, as they are if it starts from
zero. The state that it starts from is added to those once it is known; backward, the same with time reversed. What is
computed is in ``kernels/sequence_parallel.py``.
"""

from functools import partial

import torch
from torch import Tensor

from lightning_attention.kernels import sequence_parallel as plain
from lightning_attention.kernels.backend import Ranks
from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.attention import attention_backward, backward, sweep_forward
from lightning_attention.kernels.triton.fold import copy_state, fold_ends, fold_starts, write_lengths
from lightning_attention.kernels.triton.padding import clear_padding
from lightning_attention.kernels.triton.plan import plan
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.scan import scan
from lightning_attention.kernels.triton.states import local_states, states
from lightning_attention.kernels.triton.tiling import columns_at_once, tiling


@recorded
def sequence_parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, batch_invariant: bool, ranks: Ranks,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    log_decay, cu_seqlens = dispatch.dense(log_decay), dispatch.dense(cu_seqlens)
    (B, T, H, E), D = v.shape, k.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = N * H * D * E

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=v.device)

    # Each rank sends the states that its slices leave and, flat behind them, how many tokens these have. Those travel
    # as floats: past 2^24 they round as λ^n itself does.
    message, gathered = empty(size + N), empty(ranks.size * (size + N))
    start, lengths, final = empty(N, H, D, E), empty(ranks.size, N), None
    if output_final_state:
        final = empty(N, H, D, E)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    segments = boundary_states = None
    if T == 0:
        message.zero_()
    else:
        own = message[:size].view(N, H, D, E)
        chosen = tiling(q, k, v, batch_invariant=batch_invariant)
        programs = H * -(-E // chosen.tiles.TE)
        segments = plan(k, v, cu_seqlens, chosen, programs, batch_invariant, True)
        local = own
        if segments.is_split:
            (local,), (boundary_states,) = segments.allocate_states(k, v)
        views = (*chosen.inputs[1:], None, None)
        local_states(segments, chosen.tiles, log_decay, scale, (k, v), None, local, None, views, own)
        if boundary_states is not None:
            scan(segments, log_decay, cu_seqlens, N, T, (local, boundary_states), final=own)
        write_lengths(cu_seqlens, T, message[size:])
    dispatch.apart(ranks.gather, message, gathered)()
    fold_starts(
        gathered, initial_state, start, final, lengths, segments, boundary_states, log_decay, ranks.rank
    )  # fmt: skip
    if segments is not None:
        sweep_forward(segments, chosen, q, k, v, out, log_decay, scale, start, None, boundary_states)
        if cu_seqlens is not None:
            clear_padding(cu_seqlens, T, out)
    return out, final, start, lengths


def sequence_parallel_backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, start: Tensor,
    cu_seqlens: Tensor | None, lengths: Tensor, scale: float, batch_invariant: bool, need_dlog_decay: bool,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    dout = dispatch.with_unit_rows(dout)
    args = (
        dout, dfinal, q, k, v, log_decay, start, cu_seqlens, lengths, scale, batch_invariant, need_dlog_decay, ranks,
    )  # fmt: skip
    if columns_at_once(k, v, need_dlog_decay) == v.shape[3]:
        return _backward(*args)
    return plain.sequence_parallel_backward(states, attention_backward, *args)  # which takes v in parts


@recorded
def _backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, start: Tensor,
    cu_seqlens: Tensor | None, lengths: Tensor, scale: float, batch_invariant: bool, need_dlog_decay: bool,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The backward pass where v has no more columns than the sweeps for dq and dk take.

    The states before segments, which need nothing from elsewhere, are computed while the gradients are under way.
    """
    log_decay, cu_seqlens = dispatch.dense(log_decay), dispatch.dense(cu_seqlens)
    (_, T, H, E), D, N = v.shape, k.shape[3], start.shape[0]

    def empty(count: int) -> Tensor:
        return torch.empty(count, *start.shape, dtype=torch.float32, device=v.device)

    # Each rank sends the gradient of what its slice starts from and, where there are any, that of the final state.
    message = empty(1 if dfinal is None else 2)
    gathered, dend = empty(ranks.size * message.shape[0]), torch.empty_like(start)
    if dfinal is not None:
        copy_state(dfinal.contiguous(), message[1])
    segments = between = grads_after = None
    own = message[0]
    if T == 0:
        own.zero_()
    else:
        chosen = tiling(q, k, v, dout, batch_invariant=batch_invariant, backward=True, learned=need_dlog_decay)
        tiles, (q_view, k_view, v_view, dout_view) = chosen.tiles, chosen.inputs
        programs = H * (2 * -(-D // tiles.TD) + -(-E // tiles.TE))
        segments = plan(k, v, cu_seqlens, chosen, programs, batch_invariant, True, reverse=True)
        local_after = own
        if segments.is_split:
            (local_before, local_after), (states_before, grads_after) = segments.allocate_states(k, v, 2)
        local_states(
            segments, tiles, log_decay, scale, None, (q, dout), None, local_after, (None, None, q_view, dout_view), own
        )
        if grads_after is not None:
            scan(segments, log_decay, cu_seqlens, N, T, None, (local_after, grads_after), final=own)
    wait = dispatch.apart(partial(ranks.gather, meanwhile=True), message, gathered)
    if segments is not None and grads_after is not None:
        local_states(segments, tiles, log_decay, scale, (k, v), None, local_before, None, (k_view, v_view, None, None))
        scan(segments, log_decay, cu_seqlens, N, T, (local_before, states_before), initial=start)
        between = segments, states_before, grads_after
    wait()
    fold_ends(gathered, lengths, dend, segments, grads_after, log_decay, cu_seqlens, T, ranks.rank)
    dq, dk, dv, dlog_decay, dstart = backward(
        dout, dend, q, k, v, log_decay, start, cu_seqlens, scale, batch_invariant, need_dlog_decay, between
    )
    assert dstart is not None
    return dq, dk, dv, dlog_decay, dstart
