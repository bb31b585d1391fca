"""The states that sequences, or segments of them, leave by themselves: a pass that reads what matters to them."""

import torch
from torch import Tensor

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.plan import Plan, plan
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.scan import scan
from lightning_attention.kernels.triton.sweeps.interface import sweep_for
from lightning_attention.kernels.triton.tiling import TensorView, Tiles, tiling

Pair = tuple[Tensor, Tensor]


def local_states(
    plan: Plan, tiles: Tiles, log_decay: Tensor | None, scale: float, before: Pair | None, after: Pair | None,
    local_before: Tensor | None, local_after: Tensor | None, views: tuple[TensorView | None, ...],
    final: Tensor | None = None, segments_in_flight: int | None = None,
) -> None:  # fmt: skip
    """What each piece of a segment, but the last, would leave if it started from zero, as ``Plan.allocate_states``.

    ``before``, k and v, is for the states before segments; ``after``, q and dout, for the gradients of those after
    them. ``views`` are of these four. With ``final`` [N, H, D, E] the last segments as well, and whole sequences there.
    """
    sweep = sweep_for(tiles.sweep)
    k, v = before or (None, None)
    q, dout = after or (None, None)
    some, other = before or after  # type: ignore[misc]
    (_, T, H, E), D = other.shape, some.shape[3]
    count = plan.full_segments * plan.pieces
    if after is not None or final is not None:  # a last segment of a sequence is a first one with time reversed
        count += plan.segment_count - plan.full_segments
    args = (
        *sweep.read(k, views[0], tiles, tiles.BD), *sweep.read_tile(v, views[1], tiles, tiles.TE),
        *sweep.read(q, views[2], tiles, tiles.BD), *sweep.read_tile(dout, views[3], tiles, tiles.TE), log_decay,
        local_before, local_after, final, *plan.segmentation, plan.piece_rows, plan.last_piece_rows, count, T, H, D, E,
        scale,
    )  # fmt: skip
    programs = H * -(-E // tiles.TE) * (1 if before is None or after is None else 2)
    grid = (min(count, segments_in_flight or count) * programs, 1, 1)
    constants = (tiles, segments_in_flight is not None)
    sweep.launch(sweep.states, grid, args, constants, tiles.warps, some.get_device())


@recorded
def states(
    k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, batch_invariant: bool
) -> Tensor:
    log_decay, cu_seqlens = dispatch.dense(log_decay), dispatch.dense(cu_seqlens)
    (B, T, H, E), D = v.shape, k.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = torch.empty(N, H, D, E, dtype=torch.float32, device=v.device)
    if T == 0:
        return final.zero_()
    chosen = tiling(k, k, v, batch_invariant=batch_invariant)
    tiles, _, (_, *views), _ = chosen
    programs = H * -(-E // tiles.TE)
    segments = plan(k, v, cu_seqlens, chosen, programs, batch_invariant, True)
    (local,), (boundary,) = segments.allocate_states(k, v) if segments.is_split else ((final,), (final,))
    if reverse:
        local_states(segments, tiles, log_decay, 1.0, None, (k, v), None, local, (None, None, *views), final)
    else:
        local_states(segments, tiles, log_decay, 1.0, (k, v), None, local, None, (*views, None, None), final)
    if segments.is_split:
        pair = local, boundary
        scan(
            segments, log_decay, cu_seqlens, N, T, None if reverse else pair, pair if reverse else None, final=final
        )  # fmt: skip
    return final
