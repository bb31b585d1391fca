"""The states that sequences leave from zero: what sequence parallelism computes before any output."""

from typing import Any

from torch import Tensor

from lightning_attention.ops import backends, validation
from lightning_attention.ops.operation import Operation


def _states(
    k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, batch_invariant: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    """Σ_t λ^(n−1−t) k_tᵀ v_t over t = 0 … n−1 of each sequence, [N, H, D, E]; ``reverse``: Σ_t λ^(t+1) k_tᵀ v_t."""
    validation.check_cu_seqlens_values(cu_seqlens, k.shape[1])
    validation.check_log_decay_values(log_decay)
    return backends.get(backend).states(k, v, log_decay, cu_seqlens, reverse, batch_invariant)


def new_states(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for a state of each sequence."""
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(N, v.shape[2], k.shape[3], v.shape[3], dtype=validation.state_dtype(k))


def _states_fake(*inputs: Any) -> Tensor:
    k, v, _, cu_seqlens, *_ = inputs
    return new_states(k, v, cu_seqlens)


states = Operation(_states, _states_fake)
