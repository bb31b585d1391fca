"""Powers of each head's decay as exponentials of non-positive numbers, and states that decay."""

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


def carried(rate: Tensor, tokens: Tensor | int, before: Tensor, new: Tensor) -> Tensor:
    """λ^tokens · before + new, states [N, H, D, E]; rate [H], tokens [N, 1 or H] or one number.

    ``new`` is written to.
    """
    keep, rest = parts((rate * tokens)[..., None, None])
    return new.addcmul_(rest, before).addcmul_(keep, before)
