"""One token for each of many sequences, their states in one pool."""

from torch import Tensor

from lightning_attention.ops import backends, validation
from lightning_attention.ops.operation import Operation, cast_for_autocast, like_v, nothing
from lightning_attention.ops.quantized import QuantizedStates, check_has_rings, planes
from lightning_attention.ops.recent import WRITTEN, RecentTokens, check_recent, tensors


def lightning_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | QuantizedStates,
    *,
    slots: Tensor | None = None,
    scale: float | None = 1.0,
    batch_invariant: bool = False,
    recent: RecentTokens | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One step of the recurrence for N sequences: S ← λ S + kᵀ v in place, o = scale · q S.

    With ``recent`` S is what the pool's row and the ring make together.

    Not differentiable. Nothing is read on the host, so a call can be captured in a CUDA graph.

    Args:
        q: [N, Hk, D], bfloat16, float16 or float32 or, on a CPU, float64; any strides with a unit last one. Hk is H or
            divides it, as in ``lightning_attention``.
        k: [N, Hk, D], of q's dtype.
        v: [N, H, E], of q's dtype.
        log_decay: [H] float32, natural logarithm of the decay, at most 0 (checked on the CPU); −inf: no memory.
            None for no decay.
        state: [S, H, D, E] float32, bfloat16 or float16 or, for float64 inputs, float64, the pool; rows of ``slots``
            are updated in place. A 16-bit row is rounded once, after the step; the output comes from the state before
            rounding. Or QuantizedStates, the pool in 8 bits, with ``recent``; docs/numerics.md has its error.
        slots: [N] int32 or int64, the row of ``state`` that each sequence owns; a negative slot is padding: no
            state is touched, and its output is as ``out`` says. A slot given twice is an error, found only on the CPU.
            None: row i for sequence i, and S = N.
        scale: factor on the output; None for D^(-1/2).
        batch_invariant: make the bits of a sequence's output and state independent of how many other sequences there
            are. They are not those of ``lightning_attention``, which rounds operands that this does not:
            docs/numerics.md.
        recent: the pool's rings of recent tokens, to which the step appends: it reads the state, and writes 1/R of it.
            None: the state is written, which one in 8 bits cannot be.
        out: [N, H, E] of q's dtype, contiguous, no part of another argument: the outputs are written there, rows of
            padding are left alone, and ``out`` is returned. None: a new tensor, whose rows of padding are zero.

    Returns:
        [N, H, E] in q's dtype.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype other than the above.
        ValueError: a shape, stride or device does not fit, or an input requires grad; on the CPU also
            a slot past the pool or given twice.
    """
    q, k, v = cast_for_autocast(q, k, v)
    pool, low, state_scale = planes(state)
    operation = decode if out is None else decode_out
    ring = tensors(recent)
    given = q, k, v, log_decay, pool, slots, *ring, low, state_scale, out
    run = operation.known(given)
    if run is None:
        validation.check_no_grad(q=q, k=k, v=v, log_decay=log_decay, state=pool)
        validation.check_inputs(q, k, v, log_decay, "N")
        validation.check_pool(pool, q, v, slots, q.shape[0], low is not None)
        check_has_rings(state, recent)
        check_recent(recent, pool, q)
        if out is not None:
            validation.check_out(out, v)
        run = operation.checked(given)
    scale = validation.checked_scale(scale, q)
    backend = backends.choose(None, q.device)
    inputs = q, k, v, log_decay, pool, slots, scale, batch_invariant, *ring, low, state_scale, backend
    if out is None:
        return run(*inputs)
    run(*inputs, out)
    return out


def _decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float,
    batch_invariant: bool, recent_k: Tensor | None, recent_v: Tensor | None, recent_count: Tensor | None,
    state_low: Tensor | None, state_scale: Tensor | None, backend: str, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    validation.check_slot_values(slots, state.shape[0])
    validation.check_log_decay_values(log_decay)
    run = backends.get(backend)
    if recent_count is None:  # what either returns is None where out is given
        return run.decode(q, k, v, log_decay, state, slots, scale, batch_invariant, out)  # type: ignore[return-value]
    return run.decode_recent(  # type: ignore[return-value]
        q, k, v, log_decay, state, slots, scale, batch_invariant, recent_k, recent_v, recent_count, state_low,
        state_scale, out,
    )  # fmt: skip


decode = Operation(_decode, like_v, writes=WRITTEN)
decode_out = Operation(_decode, nothing, writes=[*WRITTEN, "out"], into_out=True)
