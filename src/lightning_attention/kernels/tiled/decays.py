"""Powers of each head's decay, as exponentials of non-positive numbers."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

#: exp of it is zero in float64 too, and its product with an exponent is finite: λ^0 = 1 where log λ is −inf, not NaN.
NO_MEMORY = -1e4


def rate_of(log_decay: Tensor | None, H: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[H] in the accumulator's type; −inf and finfo.min, which mean no memory, become a number to compute with."""
    if log_decay is None:
        return torch.zeros(H, dtype=dtype, device=device)
    return log_decay.to(dtype).clamp(min=NO_MEMORY)


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x) as keep + rest: 1 and expm1(x) for weak decays, exp(x) and 0 for strong ones.

    What is new is added to S · rest first and to S · keep second, so that only one rounding is as large as S's.
    exp(x) alone, near 1, is off by up to 3e-8, always in one direction, which adds up over a long sequence:
    transnormer's last layer, multiplied block by block, was off by 1.6e-5 after 65,536 tokens.
    """
    weak = x > -0.5
    return torch.where(weak, 1, x.exp()), torch.where(weak, x.expm1(), 0)


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
        """The same for some heads."""
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


def carried(rate: Tensor, tokens: Tensor | int, before: Tensor, new: Tensor) -> Tensor:
    """λ^tokens · before + new, states [N, H, D, E]; rate [H], tokens [N, 1] or one number. ``new`` is written to."""
    keep, rest = parts((rate * tokens)[..., None, None])
    return new.addcmul_(rest, before).addcmul_(keep, before)
