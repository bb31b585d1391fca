"""The states that sequences leave from zero, forward or with time reversed, without outputs."""

from collections.abc import Callable

from torch import Tensor

from lightning_attention.kernels.tiled.plan import LINE, Plan, Share, left, narrowed, whole_lines
from lightning_attention.kernels.tiled.sweep import sweep


def states(
    k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, batch_invariant: bool
) -> Tensor:
    """[N, H, D, E]: Σ_t λ^(n−1−t) k_tᵀ v_t for each sequence of n tokens; ``reverse``: Σ_t λ^(t+1) k_tᵀ v_t."""
    D, E = k.shape[3], v.shape[3]
    if batch_invariant and (D % LINE or E % LINE):
        whole = states(whole_lines(k), whole_lines(v), log_decay, cu_seqlens, reverse, True)
        return narrowed(whole, D, E)
    plan = Plan(k, v, log_decay, cu_seqlens, 1.0, batch_invariant)
    result = left(None, v, cu_seqlens, D, E)

    def task(share: Share) -> Callable[[Tensor], None]:
        return lambda space: sweep(
            share.run, space, None, share.keys(k), share.tokens(v), None, leave=share.states(result), reverse=reverse
        )

    plan.run([task(share) for share in plan.shares], D, E)
    return result
