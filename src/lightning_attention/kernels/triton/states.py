"""The states that sequences leave from zero, forward or with time reversed."""

import torch
from torch import Tensor

from lightning_attention.kernels.triton.attention import attention


def states(
    k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, batch_invariant: bool
) -> Tensor:
    """[N, H, D, E] float32: Σ_t λ^(n−1−t) k_tᵀ v_t for each sequence of n tokens; ``reverse``: Σ_t λ^t k_tᵀ v_t."""
    if reverse and cu_seqlens is None:
        k, v = k.flip(1), v.flip(1)
    elif reverse and cu_seqlens is not None:
        # Sequences change places too; the padding past the last one stays last.
        token = (cu_seqlens[-1] - 1 - torch.arange(k.shape[1], device=k.device)).clamp(min=0)
        k, v = k.index_select(1, token), v.index_select(1, token)
        cu_seqlens = cu_seqlens[-1] - cu_seqlens.flip(0)
    _, state = attention(None, k, v, log_decay, None, cu_seqlens, 1.0, True, batch_invariant)
    assert state is not None
    return state.flip(0) if reverse and cu_seqlens is not None else state
