"""Rotary position embedding, on all or the first channels of a head."""

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, *, dim: int | None = None, base: float = 10000.0) -> Tensor:
    """Turn channels i and i + dim/2 of every head by the angle position · base^(−2i/dim) (arXiv 2104.09864).

    The halves are paired, not the neighbours, as in Llama and in all of transformers.

    Args:
        x: [..., H, d], queries or keys of any floating dtype.
        positions: integers, [...] or what broadcasts to it: [T] for x of [B, T, H, d].
        dim: how many of the first channels turn, even; None for all d.
        base: 10000 in the paper; larger for long contexts.

    Returns:
        Like x. Angles and products are at least float32.
    """
    dim = x.shape[-1] if dim is None else dim
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequencies = base ** (torch.arange(0, dim, 2, device=x.device, dtype=dtype) / -dim)
    angles = positions.to(dtype)[..., None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.split([dim // 2, dim // 2, x.shape[-1] - dim], -1)
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest], -1)
