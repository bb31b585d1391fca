"""Padded batches and packed documents are one thing: sequences laid end to end, with their boundaries."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch go when its padding is taken out of the way.

    The real tokens of row 0, of row 1, ... come first, and all padding last, past the end of the last sequence. So
    no state decays over padding and none reads it, wherever in a row it is, and every shape stays [B·T]: nothing
    here waits for the device.

    Attributes:
        order: [B·T] int64, which token of the flattened batch each packed token is.
        inverse: [B·T] int64, where in the packed order each token of the flattened batch is.
        cu_seqlens: [B+1] int32, the boundaries of the B rows; padding is past the last one.
        lengths: [B] int64, the real tokens of each row.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    lengths: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Packing":
        """Take apart a batch whose real tokens are where ``mask``, [B, T] bool, is true."""
        order = (~mask).flatten().to(torch.uint8).argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        lengths = mask.sum(1)
        return cls(order, inverse, F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), lengths)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] → [1, B·T, ...]."""
        return x.flatten(0, 1).index_select(0, self.order).unsqueeze(0)

    def unpack(self, x: Tensor, batch: int) -> Tensor:
        """[1, B·T, ...] → [B, T, ...]; what comes for padding means nothing."""
        return x[0].index_select(0, self.inverse.to(x.device)).unflatten(0, (batch, -1))


def packed_positions(cu_seqlens: Tensor, length: int, offsets: Tensor | None) -> Tensor:
    """Positions of ``length`` packed tokens, [length] int64: from 0, or from ``offsets`` [N], in every sequence."""
    index = torch.arange(length, device=cu_seqlens.device)
    # A token belongs to the last sequence that starts at or before it; empty sequences own none.
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index.to(cu_seqlens.dtype), right=True)
    starts = cu_seqlens[:-1].long() if offsets is None else cu_seqlens[:-1] - offsets
    return index - starts[sequence]


def document_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which of ``length`` packed tokens begin a sequence, [length] bool."""
    # One longer than the tokens: an empty sequence at the end starts where they stop.
    starts = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    return starts.index_fill_(0, cu_seqlens[:-1].long(), True)[:length]
