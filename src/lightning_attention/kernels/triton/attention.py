"""Forward and backward on a GPU: what is launched, in which order, over which buffers."""

import torch
from torch import Tensor

from lightning_attention.kernels.pool import summed
from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.padding import clear_padding
from lightning_attention.kernels.triton.plan import Plan, plan
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.scan import scan
from lightning_attention.kernels.triton.states import local_states
from lightning_attention.kernels.triton.sweeps.interface import sweep_for
from lightning_attention.kernels.triton.tiling import Tiling, columns_at_once, tiling, with_decay_gradient


def sweep_forward(
    plan: Plan, tiling: Tiling, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_decay: Tensor | None, scale: float,
    initial: Tensor | None, final: Tensor | None, boundary_states: Tensor | None, slots: Tensor | None = None,
    fresh: Tensor | None = None, segments_in_flight: int | None = None,
) -> None:  # fmt: skip
    """Write the outputs of q and k [B, T, Hk, D] and v [B, T, H, E].

    They start from ``initial`` and, of split sequences, from ``boundary_states``.
    ``initial`` and ``final`` are states of sequences, sequence i's in row ``slots[i]`` where there are slots, and of
    the same strides, each of them contiguous, or its transpose where the tiles say so; where ``fresh[i]`` a sequence
    starts from zero. At most ``segments_in_flight`` are swept at once, by programs that go on to others.
    """
    tiles, _, (q_view, k_view, v_view), (_, out_view) = tiling
    sweep = sweep_for(tiles.sweep)
    (_, T, H, E), D = v.shape, k.shape[3]
    states = final if final is not None else initial
    strides = (H * D * E, D * E) if states is None else states.stride()[:2]
    count = plan.segment_count
    args = (
        *sweep.read(q, q_view, tiles, tiles.BD), *sweep.read(k, k_view, tiles, tiles.BD),
        *sweep.read_tile(v, v_view, tiles, tiles.TE), *sweep.write(out, out_view, tiles, tiles.TE), log_decay,
        initial if plan.uses_initial_state else None, final, *strides, slots, fresh, boundary_states,
        *plan.segmentation, count, T, H, D, E, scale,
    )  # fmt: skip
    grid = (min(count, segments_in_flight or count) * H * -(-E // tiles.TE), 1, 1)
    constants = (tiles, segments_in_flight is not None)
    sweep.launch(sweep.forward, grid, args, constants, tiles.warps, k.get_device())


@recorded
def attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, output_final_state: bool, batch_invariant: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    log_decay, cu_seqlens = dispatch.dense(log_decay), dispatch.dense(cu_seqlens)
    (B, T, H, E), D = v.shape, k.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = torch.empty(N, H, D, E, dtype=torch.float32, device=v.device) if output_final_state else None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if T == 0:
        if final is not None:
            final.zero_() if initial_state is None else final.copy_(initial_state)
        return out, final
    chosen = tiling(q, k, v, batch_invariant=batch_invariant)
    tiles = chosen.tiles
    programs = H * -(-E // tiles.TE)
    has_states = initial_state is not None or output_final_state
    segments = plan(k, v, cu_seqlens, chosen, programs, batch_invariant, has_states, output_final_state)
    boundary_states = None
    if segments.is_split:
        (local,), (boundary_states,) = segments.allocate_states(k, v)
        views = (*chosen.inputs[1:], None, None)
        local_states(segments, tiles, log_decay, scale, (k, v), None, local, None, views)
        scan(segments, log_decay, cu_seqlens, N, T, (local, boundary_states), initial=initial_state)
    sweep_forward(segments, chosen, q, k, v, out, log_decay, scale, initial_state, final, boundary_states)
    if cu_seqlens is not None:
        clear_padding(cu_seqlens, T, out)
    return out, final


@recorded
def attention_backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, batch_invariant: bool,
    need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    E = v.shape[3]
    part = columns_at_once(k, v, need_dlog_decay)
    if part == E:
        return backward(
            dout, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, batch_invariant, need_dlog_decay
        )
    columns = [slice(start, start + part) for start in range(0, E, part)]
    parts = [
        backward(
            dout[..., some], None if dfinal is None else dfinal[..., some], q, k, v[..., some], log_decay,
            None if initial_state is None else initial_state[..., some], cu_seqlens, scale, batch_invariant,
            need_dlog_decay,
        )
        for some in columns
    ]  # fmt: skip
    dq, dk, dv, dlog_decay, dinitial = zip(*parts, strict=True)
    return (
        _sum(dq), _sum(dk), torch.cat(dv, -1), None if dlog_decay[0] is None else _sum(dlog_decay),
        None if dinitial[0] is None else torch.cat(dinitial, -1),
    )  # fmt: skip


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    """The sum of the parts, rounded once as adding two is; two are not copied."""
    return parts[0] + parts[1] if len(parts) == 2 else torch.stack(parts).sum(0)


def backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, batch_invariant: bool,
    need_dlog_decay: bool, between: tuple[Plan, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``attention_backward`` where v has no more columns than the sweeps for dq and dk take.

    ``between``: the plan, states before its segments and gradients of those after them, where they are there already.
    """
    log_decay, cu_seqlens = dispatch.dense(log_decay), dispatch.dense(cu_seqlens)
    (B, T, H, E), D = v.shape, k.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dq, dk = (v.new_empty(B, T, H, D) for _ in range(2))  # for each head of v
    dinitial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    if T == 0:
        if dinitial is not None:
            dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
        return (
            summed(dq, q),
            summed(dk, k),
            dv,
            torch.zeros_like(log_decay) if log_decay is not None else None,
            dinitial,
        )
    dout = dispatch.with_unit_rows(dout)
    chosen = tiling(q, k, v, dout, batch_invariant=batch_invariant, backward=True, learned=need_dlog_decay)
    tiles, _, (q_view, k_view, v_view, dout_view), (like_k, like_v) = chosen
    d_tiles, e_tiles = -(-D // tiles.TD), -(-E // tiles.TE)
    programs = H * (2 * d_tiles + e_tiles)
    has_states = initial_state is not None or dfinal is not None
    states_before = grads_after = None
    if between is not None:
        segments, states_before, grads_after = between
    else:
        segments = plan(k, v, cu_seqlens, chosen, programs, batch_invariant, has_states, reverse=True)
        if segments.is_split:
            (local_before, local_after), (states_before, grads_after) = segments.allocate_states(k, v, 2)
            pairs = (k_view, v_view, q_view, dout_view)
            local_states(segments, tiles, log_decay, scale, (k, v), (q, dout), local_before, local_after, pairs)
            scan(
                segments, log_decay, cu_seqlens, N, T, (local_before, states_before), (local_after, grads_after),
                initial_state, dfinal,
            )  # fmt: skip
    decay_sums = None
    if need_dlog_decay:  # what each program of dq and dk adds
        tiles = with_decay_gradient(tiles)
        decay_sums = torch.zeros(segments.segment_count, H, 2 * d_tiles, dtype=torch.float32, device=v.device)
    sweep = sweep_for(tiles.sweep)
    read, narrow, write = sweep.read, sweep.narrow, sweep.write
    BD, BE, TD, TE = tiles.BD, tiles.BE, tiles.TD, tiles.TE
    initial, ahead = (initial_state, dfinal) if segments.uses_initial_state else (None, None)
    args = (
        *read(q, q_view, tiles, BD), *read(k, k_view, tiles, BD), *read(v, v_view, tiles, BE),
        *read(dout, dout_view, tiles, BE), *narrow(q, q_view, tiles, TD), *narrow(k, k_view, tiles, TD),
        *narrow(dout, dout_view, tiles, TE), *write(dq, like_k, tiles, TD), *write(dk, like_k, tiles, TD),
        *write(dv, like_v, tiles, TE), log_decay, initial, ahead, dinitial, states_before, grads_after,
        decay_sums, *segments.segmentation, T, H, D, E, scale,
    )  # fmt: skip
    grid = (segments.segment_count * programs, 1, 1)
    sweep.launch(sweep.backward, grid, args, (tiles,), tiles.warps, k.get_device())
    if cu_seqlens is not None:
        clear_padding(cu_seqlens, T, dq, dk, dv)
    dlog_decay = None if decay_sums is None else decay_sums.sum((0, 2))
    return summed(dq, q), summed(dk, k), dv, dlog_decay, dinitial
