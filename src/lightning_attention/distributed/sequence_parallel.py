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

import torch
import torch.distributed as dist
from torch import Tensor


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    # The one public collective that every torch from 2.10 on has without a warning and that torch.compile can trace.
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x, group=group)
    return gathered


def _powers(log_decay: Tensor | None, lengths: Tensor, H: int) -> Tensor:
    """λ^n: lengths [R, N] -> [R, N, H, 1, 1]."""
    rate = lengths.new_zeros(H) if log_decay is None else log_decay.to(lengths.dtype)
    return (lengths[..., None] * rate).exp()[..., None, None]


def is_first(group: dist.ProcessGroup) -> bool:
    """Whether this rank has the first slice."""
    return dist.get_rank(group) == 0


def starting_state(
    own: Tensor,
    lengths: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    group: dist.ProcessGroup,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gather what every slice leaves, and carry the initial state over the slices.

    Args:
        own: [N, H, D, E], L of this rank.
        lengths: [N], n of this rank, of own's dtype.
        log_decay: [H], or None.
        initial_state: [N, H, D, E], S_0, or None for zero.
        group: the ranks, in the order of their slices.
        output_final_state: whether to return the state after the last slice.

    Returns:
        S of this rank, the state after the last slice or None, and λ^n of every rank, [R, N, H, 1, 1].
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    gathered = _all_gather(torch.cat([own.flatten(1), lengths[:, None]], 1), group)
    powers = _powers(log_decay, torch.stack([x[:, -1] for x in gathered]), own.shape[1])
    state = start = torch.zeros_like(own) if initial_state is None else initial_state
    for r in range(size if output_final_state else rank):
        state = torch.addcmul(gathered[r][:, :-1].view_as(own), powers[r], state)
        if r == rank - 1:
            start = state
    return start, state if output_final_state else None, powers


def gradient_of_end(grad: Tensor, dfinal: Tensor | None, powers: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the gradients of every slice's starting state, and carry them back over the slices.

    Args:
        grad: [N, H, D, E], G of this rank.
        dfinal: [N, H, D, E], the gradient of the final state in this rank's loss; None where no rank has one.
        powers: [R, N, H, 1, 1], λ^n of every rank.
        group: the ranks, in the order of their slices.

    Returns:
        A of this rank.
    """
    gathered = _all_gather(torch.stack([grad] if dfinal is None else [grad, dfinal]), group)
    dend = torch.zeros_like(grad) if dfinal is None else torch.stack([x[1] for x in gathered]).sum(0)
    for r in range(dist.get_world_size(group) - 1, dist.get_rank(group), -1):
        dend = torch.addcmul(gathered[r][0], powers[r], dend)
    return dend
