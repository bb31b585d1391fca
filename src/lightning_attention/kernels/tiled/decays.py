"""Powers of each head's decay over the rows of blocks."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from lightning_attention.kernels.decays import parts


class Decay:
    """The parts of M, Λ and Γ that do not depend on where a sequence ends, for some heads or all.

    Args:
        rate: [H], log λ.
        scale: factor on M and Λ.
        block: C.
    """

    def __init__(self, rate: Tensor, scale: float, block: int) -> None:
        self.rate, self.scale, self.block = rate, scale, block
        row = torch.arange(block, device=rate.device)
        distance = row[:, None] - row
        self.rows = row + 1
        #: i − j [C, C], M's exponent
        self.distance = distance.clamp(min=0).to(rate.dtype)
        #: scale · M [H, C, C]
        self.mask = torch.where(distance >= 0, self.power(self.distance), 0).mul_(scale)
        #: scale · Λ [H, C, 1]: a block's start to each row, λ¹ … λ^C
        self.start = self.power(row + 1).mul_(scale).unsqueeze(-1)

    def power(self, exponent: Tensor) -> Tensor:
        """λ^exponent, [H, *exponent.shape], for exponents ≥ 0."""
        return (self.rate.view(-1, *(1,) * exponent.ndim) * exponent).exp()

    def of(self, heads: slice) -> "Decay":
        """These decays for some heads."""
        part = copy(self)
        part.rate, part.mask, part.start = self.rate[heads], self.mask[heads], self.start[heads]
        return part


class Crossing:
    """The decays over the n blocks of a piece, [n, 1, H, ·, ·] or n times [H, ·, ·], for some heads or all."""

    def __init__(self, decay: Decay, length: Tensor) -> None:
        self._rate, self._length = decay.rate[:, None, None], length
        left = (length[:, None] - decay.rows).clamp(min=0)
        #: m − r [n, 1, 1, C, 1], Γ's exponent, of row r in a block of m tokens; 0 for rows past it
        self.left = left[:, None, None, :, None]
        #: Γ [n, 1, H, C, 1]: each row to the end of its block, λ^(m−1) … λ^0
        self.end = (self._rate * self.left).exp()
        #: λ^m, a whole block, as keep + rest
        self.keep, self.rest = (x.unbind(0) for x in parts(self._over(length)))

    def _over(self, tokens: Tensor) -> Tensor:
        return self._rate * tokens[:, None, None, None]

    @cached_property
    def across(self) -> Sequence[Tensor]:
        """λ^m as one number."""
        return self._over(self._length).exp().unbind(0)

    @cached_property
    def slope(self) -> Sequence[Tensor]:
        """λ^m times m."""
        return (self._length[:, None, None, None] * self._over(self._length).exp()).unbind(0)

    @cached_property
    def entering(self) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """Across, keep and rest from the start of the piece to the end of each block."""
        return self._from_edge(self._length.cumsum(0))

    @cached_property
    def entering_backwards(self) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """The same from the end of the piece to the start of each block."""
        done = self._length.cumsum(0)
        return self._from_edge(done[-1:] - done + self._length)

    def _from_edge(self, tokens: Tensor) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        keep, rest = parts(self._over(tokens))
        return self._over(tokens).exp().unsqueeze(1), keep.unbind(0), rest.unbind(0)
