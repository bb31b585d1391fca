"""A pool of states and the tokens of packed sequences, without looking at slots or lengths on the host."""

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """What states and sums are computed in for inputs like x: float32, and float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def repeated(x: Tensor, v: Tensor) -> Tensor:
    """A head of q or k [..., Hk, X] for each head of v [..., H, E]; a copy where there are fewer."""
    return x if x.shape[-2] == v.shape[-2] else x.repeat_interleave(v.shape[-2] // x.shape[-2], -2)


def summed(x: Tensor, like: Tensor) -> Tensor:
    """The gradient of q or k, ``like`` [..., Hk, X], from that for each head of v [..., H, X]."""
    return x if x.shape == like.shape else x.unflatten(-2, (like.shape[-2], -1)).sum(-2)


def read(state: Tensor, slots: Tensor | None, dtype: torch.dtype, fresh: Tensor | None = None) -> Tensor:
    """[S, H, D, E] -> [N, H, D, E] of dtype; zero for padding (a negative slot) and where ``fresh``."""
    if slots is None:
        rows, empty = state.to(dtype), fresh
    elif state.shape[0] == 0:  # a pool of no rows serves padding
        return state.new_zeros(slots.numel(), *state.shape[1:], dtype=dtype)
    else:
        rows = state.index_select(0, slots.clamp(min=0).long()).to(dtype)
        empty = slots < 0 if fresh is None else fresh | (slots < 0)
    # Replaced, not multiplied: a row that nobody owns may hold anything, and 0 · inf is NaN.
    return rows if empty is None else torch.where(empty[:, None, None, None], 0, rows)


def write(state: Tensor, slots: Tensor | None, rows: Tensor) -> None:
    """Write [N, H, D, E] to the rows of ``state`` that the slots name; a negative slot touches nothing."""
    if slots is None:
        state.copy_(rows)
        return
    if slots.numel() == 0 or state.shape[0] == 0:
        return
    # Padding repeats the write of some owned slot, the same bits to the same place, so the number of writes does not
    # depend on the slots. Where there is no owned slot, row 0 is written back as it is.
    owned = slots >= 0
    some = owned.int().argmax()
    source = torch.where(owned, torch.arange(slots.numel(), device=slots.device), some)
    target = slots.long()[source].clamp(min=0)
    values = torch.where(owned.any(), rows.index_select(0, source).to(state.dtype), state[:1])
    state.index_copy_(0, target, values)


def write_after_drafts(
    snapshots: Tensor, snapshot_slots: Tensor, slots: Tensor | None, cu_seqlens: Tensor, after: Tensor
) -> None:
    """Write the states after drafts, [T, H, D, E], to rows of ``snapshots``, those in ``snapshot_slots`` [N, P]."""
    if after.shape[0] == 0:
        return
    draft = torch.arange(snapshot_slots.shape[1], device=after.device)
    wanted = draft < cu_seqlens.diff()[:, None]
    if slots is not None:
        wanted &= (slots >= 0)[:, None]
    token = (cu_seqlens[:-1, None].long() + draft).clamp(max=after.shape[0] - 1)
    write(snapshots, torch.where(wanted, snapshot_slots, -1).flatten(), after[token.flatten()])


def deliver(
    found: Tensor, like: Tensor, slots: Tensor | None, cu_seqlens: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """Outputs in the dtype of ``like``, zero at padding; or None, and in ``out`` all but padding is written.

    found: [T, …], zero past the last sequence; without ``cu_seqlens`` each token is a sequence.
    """
    used = None if slots is None else slots >= 0
    if cu_seqlens is not None and used is not None:
        used = used[sequence_of(cu_seqlens, found.shape[0])]
    if cu_seqlens is not None and out is not None:
        inside = torch.arange(found.shape[0], device=found.device) < cu_seqlens[-1]
        used = inside if used is None else used & inside
    if used is not None:
        found = torch.where(used[:, None, None], found, 0 if out is None else out)
    if out is None:
        return found.to(like.dtype)
    out.copy_(found)
    return None


def sequence_of(cu_seqlens: Tensor, T: int) -> Tensor:
    """[T]: which sequence each token belongs to; the last one for tokens past it."""
    token = torch.arange(T, device=cu_seqlens.device)
    return (torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1).clamp(max=cu_seqlens.numel() - 2)


def packed_together(taken: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The order [T] that puts the tokens ``taken`` [T] first, and their cu_seqlens; the others are padding there."""
    count = torch.cat([taken.new_zeros(1, dtype=torch.long), taken.long().cumsum(0)])
    return (~taken).int().argsort(stable=True), count[cu_seqlens.long()]
