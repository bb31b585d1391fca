"""Rows that are cut over the ranks of a group: which documents cross from rank to rank, labels, and the loss.

At most one document of a slice comes from the rank before, and at most one goes on to the next. Only their states
travel: the others are computed as if there were no group. So what is sent does not depend on the number of documents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attention.models.transnormer.packing import Packing, local_mask, may_restart, pack_batch
from lightning_attention.nn.positions import tokens_before

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SliceDocuments:
    """Where documents begin in this rank's slices of B rows.

    Attributes:
        begins: [B, T] bool, true where a document begins.
        starts: [M] int64, the same tokens as places in the flattened slices, in order; B·T for none.
    """

    begins: Tensor
    starts: Tensor


def _by_boundaries(cu_seqlens: Tensor, length: int, group: "ProcessGroup") -> SliceDocuments | None:
    """The documents of a row cut by ``cu_seqlens``, [N+1], of which this rank has ``length`` tokens; None for one.

    Raises:
        ValueError: the row that ``cu_seqlens`` describes is not as long as the ranks' slices together; looked at only
            on a CPU, where that costs nothing.
    """
    from lightning_attention.distributed.sequence_parallel import gathered

    lengths = gathered(torch.full((), length, device=cu_seqlens.device), group)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and cu_seqlens[-1] != lengths.sum():
        raise ValueError(
            f"cu_seqlens ends at {cu_seqlens[-1]} and the slices have {lengths.sum()} tokens together; "
            "with group it has the borders of the whole row, on every rank"
        )
    if len(cu_seqlens) == 2:
        return None
    places = cu_seqlens[:-1].long() - lengths[: group.rank()].sum()
    starts = torch.where((places >= 0) & (places < length), places, length)
    begins = torch.zeros(1, length + 1, dtype=torch.bool, device=starts.device).index_fill_(1, starts, True)
    return SliceDocuments(begins[:, :length], starts.sort().values)


# Not traced, as packing.documents is not.
@torch.compiler.disable(reason="position_ids say how many documents there are; pass cu_seqlens to stay in one graph")
def _by_positions(position_ids: Tensor, batch: int, group: "ProcessGroup") -> SliceDocuments | None:
    """The documents that ``position_ids``, [B, T] or [1, T], mark by starting again; waits for the device.

    None where every row is one document.
    """
    from lightning_attention.distributed.sequence_parallel import gathered, total

    before = gathered(position_ids[:, -1], group)[group.rank() - 1]
    begins = position_ids <= torch.cat([before[:, None], position_ids[:, :-1]], 1)
    if group.rank() == 0:
        begins[:, 0] = True
    begins = begins.expand(batch, -1)
    if total(begins.sum(), group) == batch:
        return None
    return SliceDocuments(begins, begins.flatten().nonzero().squeeze(1))


def documents_of_slices(
    batch: int,
    length: int,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    group: "ProcessGroup",
) -> SliceDocuments | None:
    """Where documents begin in this rank's slices, however the model is told of them; None: every row is one."""
    if cu_seqlens is not None:
        return _by_boundaries(cu_seqlens, length, group)
    return _by_positions(position_ids, batch, group) if may_restart(position_ids, attention_mask, None) else None


def pack_slices(
    batch: int,
    length: int,
    device: torch.device,
    group: "ProcessGroup",
    *,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> Packing:
    """``pack_batch`` for this rank's slices, [batch, length], of rows on several ranks.

    Raises:
        TypeError: ``group`` is not a process group.
        ValueError: the slices are empty, ``attention_mask`` is not [batch, length], or ``cu_seqlens`` not of the whole
            row.
    """
    from lightning_attention.distributed.sequence_parallel import check_group

    check_group(group)
    if length < 1:
        raise ValueError(f"a slice has {length} tokens; with group every rank has at least one")
    if attention_mask is not None and attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}; with group it is this rank's slice, [{batch}, {length}]"
        )
    documents = documents_of_slices(batch, length, cu_seqlens, position_ids, attention_mask, group)
    if documents is not None:
        return _pack_documents(documents, position_ids, group)
    mask = local_mask(attention_mask, batch, length)
    lengths = torch.full((batch,), length, device=device) if mask is None else mask.sum(1)
    offsets = tokens_before(lengths, group) if position_ids is None else None
    return pack_batch(batch, length, device, mask=mask, position_ids=position_ids, offsets=offsets)


def _pack_documents(documents: SliceDocuments, position_ids: Tensor | None, group: "ProcessGroup") -> Packing:
    """First the tokens of documents that cross from rank to rank, then all others.

    The sequences that cross are numbered by row and by the rank on which they begin, so ranks agree on them.
    """
    from lightning_attention.distributed.sequence_parallel import gathered

    begins, rank, ranks = documents.begins, group.rank(), group.size()
    batch, length = begins.shape
    index = torch.arange(length, device=begins.device)
    latest = torch.where(begins, index, -1).cummax(1).values  # the beginning of each token's document; -1: elsewhere
    head = torch.where(begins, index, length).amin(1)  # how many tokens belong to a document from an earlier rank
    facts = torch.stack([index.new_full((batch,), length), head, latest[:, -1]])
    lengths, heads, lasts = gathered(facts, group).unbind(1)  # [ranks, B] each

    # The document that comes from before began on the last earlier rank on which any began. After that it is all there.
    earlier = torch.arange(ranks, device=begins.device)[:, None]
    owner = torch.where((lasts >= 0) & (earlier < rank), earlier, 0).amax(0)
    between = (earlier >= owner) & (earlier < rank)
    before = (lengths * between).sum(0) - (lasts.gather(0, owner[None])[0] if rank else 0)
    tail = latest[:, -1:]
    goes_on = (heads[rank + 1] > 0 if rank + 1 < ranks else torch.zeros_like(head, dtype=torch.bool))[:, None]
    crossing = (index < head[:, None]) | ((index >= tail) & goes_on)

    sizes = index.new_zeros(batch, ranks)
    sizes.scatter_(1, owner[:, None], head[:, None])
    sizes[:, rank : rank + 1] += torch.where(goes_on & (tail >= 0), length - tail, 0)
    cu_seqlens = F.pad(sizes.flatten().cumsum(0), (1, 0))
    order = (~crossing).flatten().to(torch.uint8).argsort(stable=True)
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(batch * length, device=order.device))
    own = F.pad(places, (0, 1), value=batch * length)[documents.starts]
    own = torch.where(own < cu_seqlens[-1], batch * length, own).sort().values  # without those that cross
    local = torch.cat([own.new_zeros(1), cu_seqlens[-1:], own, own.new_full((1,), batch * length)])

    if position_ids is None:
        positions = torch.where(latest < 0, index + before[:, None], index - latest)
    else:
        positions = position_ids.expand(batch, length)
    return Packing(positions.flatten()[order], cu_seqlens.diff(), cu_seqlens, order, local_cu_seqlens=local)


def next_tokens(
    labels: Tensor, documents: SliceDocuments | None, mask: Tensor | None, group: "ProcessGroup", ignored: int
) -> Tensor:
    """The label that follows each token, [B, T]: for the last one it is the next rank's first.

    ``ignored`` where the token is padding, or what follows it is another document or nothing.
    """
    from lightning_attention.distributed.sequence_parallel import gathered

    if documents is not None:
        labels = labels.masked_fill(documents.begins, ignored)
    firsts, rank = gathered(labels[:, 0], group), group.rank()
    following = firsts[rank + 1] if rank + 1 < group.size() else torch.full_like(firsts[0], ignored)
    shifted = torch.cat([labels[:, 1:], following[:, None]], 1)
    return shifted if mask is None else shifted.masked_fill(~mask, ignored)


def loss_of_slices(
    loss_function: Callable[..., Tensor],
    labels: Tensor | None,
    group: "ProcessGroup",
    *,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The mean loss of the whole rows, with this rank's part of its gradient.

    The value is the same on every rank. The gradient is that of ranks · (this rank's sum) / (number of labels on all
    ranks), so the *mean* over the group of a parameter's gradients is the gradient of the value: the mean that data
    parallelism takes over all its ranks, whether they share rows or have rows of their own.

    Args:
        loss_function: called with ``shift_labels``, ``ignore_index`` and ``num_items_in_batch``, by which it divides
            the sum over this rank's tokens.
        labels: [B, T], this rank's slices; not shifted. None only beside ``shift_labels``.
        group: the ranks that share the rows.
        cu_seqlens: [N+1], of the whole row.
        position_ids: [B, T] or [1, T], this rank's.
        attention_mask: [B, T], this rank's.
        num_items_in_batch: what to divide the sum over all ranks by, the labels of whole rows; None for those here.
        shift_labels: [B, T], the labels already shifted, with nothing to be left out.
        ignore_index: the label of what is not to be learned.
    """
    from lightning_attention.distributed.sequence_parallel import total

    if shift_labels is None:
        assert labels is not None
        batch, length = labels.shape
        documents = documents_of_slices(batch, length, cu_seqlens, position_ids, attention_mask, group)
        mask = None if attention_mask is None else attention_mask.bool()
        shift_labels = next_tokens(labels, documents, mask, group, ignore_index)
    shift_labels = shift_labels.contiguous()  # transformers' loss makes a view of it, which a slice has not
    summed = loss_function(shift_labels=shift_labels, ignore_index=ignore_index, num_items_in_batch=1)
    count = (shift_labels != ignore_index).sum().to(summed.device)
    everywhere, items = total(torch.stack([summed.double(), count.double()]), group)
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, dtype=items.dtype, device=items.device)
    part = summed * (group.size() / items).to(summed.dtype)
    return (everywhere / items).to(summed.dtype) + (part - part.detach())
