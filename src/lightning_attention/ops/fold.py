"""Rings of recent tokens emptied into the states that they belong to."""

from torch import Tensor

from lightning_attention.ops import backends, validation
from lightning_attention.ops.operation import Operation, nothing
from lightning_attention.ops.quantized import QuantizedStates, check_has_rings, planes
from lightning_attention.ops.recent import WRITTEN, RecentTokens, check_rings


def lightning_attention_fold(
    state: Tensor | QuantizedStates,
    recent: RecentTokens,
    log_decay: Tensor | None,
    *,
    slots: Tensor | None = None,
) -> None:
    """Make rows of a pool whole, in place, as if there had been no rings: S ← λ^n S + Σ_j λ^(n−j) k_jᵀ v_j.

    For whoever reads the pool itself: transfers, checkpoints, calls without ``recent``. Not differentiable. Nothing is
    read on the host.

    Args:
        state: [S, H, D, E] float32, bfloat16 or float16 or, with float64 rings, float64, the pool; a row that has
            tokens in its ring is rounded once. Or QuantizedStates, the pool in 8 bits, of which those heads are written
            that hold a token.
        recent: the pool's rings; those of the rows are then empty.
        log_decay: [H] float32, natural logarithm of the decay, at most 0 (checked on the CPU); −inf: no memory.
            None for no decay.
        slots: [N] int32 or int64, the rows to fold; negative: none. A slot given twice is an error, found only on the
            CPU. None: all.

    Raises:
        TypeError: an argument is not a tensor, ``recent`` not RecentTokens, or a dtype is not one of the above.
        ValueError: a shape, stride or device does not fit, or an input requires grad; on the CPU also
            a slot past the pool or given twice.
    """
    pool, low, state_scale = planes(state)
    check_has_rings(state, recent)
    check_rings(pool, recent, log_decay, low is not None)
    validation.check_slots(slots, pool)
    validation.check_no_grad(state=pool, log_decay=log_decay)
    backend = backends.choose(None, pool.device)
    fold(pool, log_decay, slots, recent.k, recent.v, recent.count, low, state_scale, backend)


def _fold(
    state: Tensor, log_decay: Tensor | None, slots: Tensor | None, recent_k: Tensor, recent_v: Tensor,
    recent_count: Tensor, state_low: Tensor | None, state_scale: Tensor | None, backend: str,
) -> None:  # fmt: skip
    validation.check_slot_values(slots, state.shape[0])
    validation.check_log_decay_values(log_decay)
    backends.get(backend).fold(state, log_decay, slots, None, recent_k, recent_v, recent_count, state_low, state_scale)


fold = Operation(_fold, nothing, writes=WRITTEN)
