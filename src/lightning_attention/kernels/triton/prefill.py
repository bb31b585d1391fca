"""Packed sequences that start from, and leave, their states in a pool.

Long ones are swept as in training: cut into segments where few would leave the chip idle. A single token takes
little more than to read and write its state: those get what decoding does, but where their bits are to be training's.
"""

import torch
from torch import Tensor

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.attention import sweep_forward
from lightning_attention.kernels.triton.decode import columns, over_states
from lightning_attention.kernels.triton.padding import clear_padding
from lightning_attention.kernels.triton.plan import Plan, plan_packed
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.recurrent import short_kernel
from lightning_attention.kernels.triton.scan import scan
from lightning_attention.kernels.triton.states import local_states
from lightning_attention.kernels.triton.sweeps.interface import sweep_for
from lightning_attention.kernels.triton.tiling import Tiling, tiling

#: Rows, at most, of a sequence that is read row by row.
SHORT = 1

#: Segments of a head swept at once. How many there are nobody knows: for each that may be, N + T / rows, one program
#: would be started, and 200 tokens beside two chunks cost 26,000 of them 0.1 ms, H 64, for finding nothing to do.
SEGMENTS_IN_FLIGHT = 32


def prefill(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
    slots: Tensor | None, fresh: Tensor | None, scale: float, snapshot_at: Tensor | None,
    snapshot_slots: Tensor | None, batch_invariant: bool, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    rest = log_decay, state, cu_seqlens, slots, fresh, scale, snapshot_at, snapshot_slots, batch_invariant
    if v.shape[0] == 0 and cu_seqlens.shape[0] > 1:
        # Snapshots are taken all the same, and the copy engine has no view of nothing: a token of padding stands in.
        _prefill(*(x.new_zeros(1, *x.shape[1:]) for x in (q, k, v)), *rest)
        return None if out is not None else torch.empty_like(v)
    return _prefill(q, k, v, *rest, out)


@recorded
def _prefill(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor,
    slots: Tensor | None, fresh: Tensor | None, scale: float, snapshot_at: Tensor | None,
    snapshot_slots: Tensor | None, batch_invariant: bool, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    (T, H, E), D, N = v.shape, k.shape[2], cu_seqlens.shape[0] - 1
    strides = state.stride()
    columns_first = strides[2:] != (E, 1)
    if columns_first and strides[2:] != (1, D):
        raise ValueError(
            f"state has strides {list(strides)}; backend 'triton' wants each [D, E] contiguous, or each [E, D], the "
            f"last two [{E}, 1] or [1, {D}], to prefill"
        )
    made = None if out is not None else torch.empty_like(v, memory_format=torch.contiguous_format)
    target = out if made is None else made
    assert target is not None
    batch = q[None], k[None], v[None], target[None]
    log_decay, slots, cu_seqlens = dispatch.dense(log_decay), dispatch.dense(slots), cu_seqlens.contiguous()
    fresh = None if fresh is None else fresh.contiguous().view(torch.uint8)
    chosen = tiling(*batch[:3], batch_invariant=True, out=target)  # a sequence may be cut anywhere into calls
    tiles = chosen.tiles
    of_pool = chosen._replace(tiles=tiles._replace(columns_first=columns_first))
    programs = H * -(-E // tiles.TE)
    short = -1 if batch_invariant and T > 0 else SHORT
    plan = plan_packed(cu_seqlens, max(T, 1), max(D, E), chosen, programs, batch_invariant, True, slots, short)
    plan = plan._replace(is_split=True)  # or not, the same kernels: none is compiled when the first long prompt comes
    (local,), (boundary_states,) = plan.allocate_states(*batch[1:3])
    if T > 0:
        local_states(
            plan, tiles, log_decay, scale, batch[1:3], None, local, None, (*chosen.inputs[1:], None, None),
            segments_in_flight=SEGMENTS_IN_FLIGHT,
        )  # fmt: skip
        scan(
            plan, log_decay, cu_seqlens, N, T, (local, boundary_states), initial=state, slots=slots, fresh=fresh,
            columns_first=columns_first,
        )  # fmt: skip
    # Before the pool is written to, because they may start from what is in it.
    if snapshot_at is not None and snapshot_slots is not None and snapshot_at.numel() > 0:
        _snapshots(
            plan, of_pool, *batch[1:3], log_decay, state, boundary_states, cu_seqlens, slots, fresh,
            snapshot_at, snapshot_slots,
        )  # fmt: skip
    if T > 0:
        sweep_forward(
            plan, of_pool, *batch, log_decay, scale, state, state, boundary_states, slots, fresh, SEGMENTS_IN_FLIGHT
        )  # fmt: skip
    if short >= 0:
        args = (
            q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], target, state, *strides, slots, log_decay,
            cu_seqlens, fresh, H, short, scale,
        )  # fmt: skip
        over_states(short_kernel, (N, H, D, E, tiles.group), args, state, strides, columns(D, E, q.dtype))
    if made is not None:
        clear_padding(cu_seqlens, T, made, slots=slots)
    return made


def _snapshots(
    plan: Plan, tiling: Tiling, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor,
    boundary_states: Tensor, cu_seqlens: Tensor, slots: Tensor | None, fresh: Tensor | None, snapshot_at: Tensor,
    snapshot_slots: Tensor,
) -> None:  # fmt: skip
    (_, T, H, E), D, (N, P) = v.shape, k.shape[3], snapshot_at.shape
    tiles, _, (_, k_view, v_view), _ = tiling
    sweep = sweep_for(tiles.sweep)
    args = (
        *sweep.read(k, k_view, tiles, tiles.BD), *sweep.read_tile(v, v_view, tiles, tiles.TE), log_decay, state,
        *state.stride()[:2], slots, fresh, boundary_states, cu_seqlens, plan.first_boundary, snapshot_at.contiguous(),
        snapshot_slots.contiguous(), P, plan.segment_rows, T, H, D, E,
    )  # fmt: skip
    grid = (N * P * H * -(-E // tiles.TE), 1, 1)
    sweep.launch(sweep.snapshot, grid, args, (tiles,), tiles.warps, k.get_device())
