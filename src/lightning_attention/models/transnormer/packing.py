"""How the tokens of a forward pass lie in memory (rows, packed documents, a padded batch packed), and their labels."""

from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each token of a [B, T] pass stands in its sequence, and where the N sequences begin and end.

    A padded batch is packed: the real tokens of row 0, of row 1, ... come first, and all padding last, past the end
    of the last sequence. So no state decays over padding and none reads it, wherever in a row it is, and every shape
    stays B·T: nothing waits for the device.

    Attributes:
        positions: [T] or [B, T] integers, each token's position, in the packed order where there is one; [B] for a
            step.
        lengths: [N] int64, the real tokens each sequence has in this pass.
        cu_seqlens: [N+1] integers, boundaries of packed sequences; None where every row is a sequence.
        order: [B·T] int64, which token of the flattened batch each packed token is; None where nothing moved.
        slots: [B] int64, for a step over a batch with padding: the row itself, or −1 for padding.
        local_cu_seqlens: [M+1] int64, for slices of rows on several ranks: boundaries of the sequences past the last of
            ``cu_seqlens``, of which no other rank has tokens.
    """

    positions: Tensor
    lengths: Tensor
    cu_seqlens: Tensor | None = None
    order: Tensor | None = None
    slots: Tensor | None = None
    local_cu_seqlens: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] → [1, B·T, ...] where the batch is packed; otherwise x."""
        return x if self.order is None else x.flatten(0, 1).index_select(0, self.order).unsqueeze(0)

    def unpack(self, x: Tensor, batch: int) -> Tensor:
        """Undo :meth:`pack`; the values for padding are meaningless."""
        if self.order is None:
            return x
        return torch.empty_like(x[0]).index_copy_(0, self.order.to(x.device), x[0]).unflatten(0, (batch, -1))


def pack_batch(
    batch: int,
    length: int,
    device: torch.device,
    *,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    offsets: Tensor | None = None,
    step: bool = False,
) -> Packing:
    """The packing of a pass over [batch, length] tokens.

    Args:
        batch: B.
        length: T.
        device: where the tokens are.
        mask: [B, T] bool, false for padding; None where there is none.
        position_ids: [B, T] or [1, T], the positions; None to count the real tokens of each sequence.
        cu_seqlens: [N+1] boundaries of documents packed in the rows, one row after the other; then ``mask`` is None.
        offsets: [N] int64, the real tokens each sequence read before; None for none.
        step: whether the pass is one token per row, for :meth:`TransnormerMixer.step`.
    """
    if cu_seqlens is not None:
        if position_ids is None:
            positions = _packed_positions(cu_seqlens, batch * length, offsets)
        else:
            positions = position_ids.expand(batch, length).flatten()
        order = None if batch == 1 else torch.arange(batch * length, device=device)
        return Packing(positions, cu_seqlens.diff().long(), cu_seqlens, order)
    if mask is None:
        positions = torch.arange(length, device=device)
        lengths = torch.full((batch,), length, device=device)
    else:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        lengths = mask.sum(1)
    if position_ids is not None:
        positions = position_ids.expand(batch, length)
    elif offsets is not None:
        positions = positions + offsets.unsqueeze(1)
    if step:
        slots = None if mask is None else torch.arange(batch, device=device).masked_fill(~mask.squeeze(1), -1)
        return Packing(positions.squeeze(1), lengths, slots=slots)
    if mask is None:
        return Packing(positions, lengths)
    order = (~mask).flatten().to(torch.uint8).argsort(stable=True)
    positions = positions.expand(batch, length).flatten().index_select(0, order)
    return Packing(positions, lengths, F.pad(lengths.cumsum(0), (1, 0)), order)


def restarts(position_ids: Tensor) -> Tensor:
    """Which tokens of each row begin another document, [B, T] bool: those whose position is not past the one before.

    So [0, 1, 2, 0, 0, 1] is three documents, and [0, 2, 4] is one.
    """
    return F.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0))


# Not traced: the number of documents is in the data alone, and a shape made of it would be a guard on every batch.
@torch.compiler.disable(reason="position_ids say how many documents there are; pass cu_seqlens to stay in one graph")
def documents(position_ids: Tensor, batch: int) -> Tensor | None:
    """The boundaries of the documents that ``position_ids`` mark by starting again; waits for the device.

    Args:
        position_ids: [B, T] or [1, T] integers.
        batch: B.

    Returns:
        cu_seqlens, [N+1] int64, over the flattened batch, or None where every row is one document.
    """
    begins = restarts(position_ids)
    begins[:, 0] = True
    starts = begins.expand(batch, -1).flatten().nonzero().squeeze(1)
    if len(starts) == batch:
        return None
    return F.pad(starts, (0, 1), value=batch * position_ids.shape[1])


def document_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which of ``length`` packed tokens begin a document, or the padding after the last one, [length] bool."""
    # One longer than the tokens: an empty document at the end starts where they stop.
    starts = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    return starts.index_fill_(0, cu_seqlens.long(), True)[:length]


def learnable(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: object | None,
    ignore_index: int = -100,
) -> Tensor:
    """The labels, with ``ignore_index`` where the token before one is padding or belongs to another document."""
    if cu_seqlens is not None:
        return labels.masked_fill(document_starts(cu_seqlens, labels.shape[1]), ignore_index)
    if may_restart(position_ids, attention_mask, cache):
        return labels.masked_fill(restarts(position_ids), ignore_index)
    if attention_mask is None:
        return labels
    padding = attention_mask[:, -labels.shape[1] :] == 0
    return labels.masked_fill(F.pad(padding[:, :-1], (1, 0)), ignore_index)


def one_of(cu_seqlens: Tensor | None, cu_seq_lens_q: Tensor | None) -> Tensor | None:
    """The boundaries of packed documents, by whichever of their two names they came."""
    if cu_seqlens is not None and cu_seq_lens_q is not None:
        raise ValueError("cu_seqlens and cu_seq_lens_q are both given; they are two names of one thing")
    return cu_seq_lens_q if cu_seqlens is None else cu_seqlens


def may_restart(position_ids: Tensor | None, attention_mask: Tensor | None, cache: object | None) -> TypeGuard[Tensor]:
    """Whether positions may mark documents; the condition is the one of transformers' own attention masks."""
    return position_ids is not None and attention_mask is None and cache is None


def local_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The last T columns of a mask, [B, T] bool, or None where nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; it must be [{batch}, {length} or more]")
    mask = attention_mask[:, -length:].bool()
    # Only where looking costs nothing: on a GPU this would wait for the device, in a graph it would break it.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and mask.all():
        return None
    return mask


def _packed_positions(cu_seqlens: Tensor, length: int, offsets: Tensor | None) -> Tensor:
    index = torch.arange(length, device=cu_seqlens.device)
    # A token belongs to the last document that starts at or before it; tokens past the end go with the last one.
    ends = cu_seqlens[1:-1].contiguous()
    document = torch.searchsorted(ends, index.to(ends.dtype), right=True)
    starts = cu_seqlens[:-1] if offsets is None else cu_seqlens[:-1] - offsets
    return index - starts[document]
