"""A packed batch of prompts, continued chunks and single tokens, their states in one pool."""

import torch
from torch import Tensor

from lightning_attention.ops import backends, validation
from lightning_attention.ops.operation import Operation, cast_for_autocast, like_v, nothing
from lightning_attention.ops.quantized import QuantizedStates, planes
from lightning_attention.ops.recent import WRITTEN, RecentTokens, check_recent, tensors


def lightning_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | QuantizedStates,
    *,
    cu_seqlens: Tensor,
    slots: Tensor | None = None,
    fresh: Tensor | None = None,
    scale: float | None = 1.0,
    snapshot_at: Tensor | None = None,
    snapshot_slots: Tensor | None = None,
    batch_invariant: bool = False,
    recent: RecentTokens | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``lightning_attention`` over N packed sequences that start from, and leave, their states in a pool.

    Not differentiable. Nothing is read on the host: lengths, slots and the rest may change between replays of a CUDA
    graph.

    Args:
        q: [T, Hk, D], bfloat16, float16 or float32 or, on a CPU, float64; any strides with a unit last one. Hk is H or
            divides it, as in ``lightning_attention``.
        k: [T, Hk, D], of q's dtype.
        v: [T, H, E], of q's dtype.
        log_decay: [H] float32, natural logarithm of the decay, at most 0 (checked on the CPU); −inf: no memory.
            None for no decay.
        state: [S, H, D, E] float32, bfloat16 or float16 or, for float64 inputs, float64, the pool; a 16-bit row is
            rounded once, at the end of the call. On a GPU each [D, E] must be contiguous, or the transpose of a
            contiguous [E, D]. Or QuantizedStates, the pool in 8 bits: the call works on float32 copies of its rows,
            (N + N·P) · H·D·E numbers, and rounds each once, at its end.
        cu_seqlens: [N+1] int32 or int64, 0 = c_0 ≤ … ≤ c_N ≤ T: sequence i is tokens c_i to c_{i+1}, one token or
            many or none. Tokens past c_N are padding: never read.
        slots: [N] int32 or int64, the row of ``state`` that each sequence owns; negative: all of it is padding, no
            state is touched. A slot given twice is an error, found only on the CPU. None: row i, S = N.
        fresh: [N] bool, True for a sequence that starts from zero, whatever its slot holds; None: none does.
        scale: factor on the output; None for D^(-1/2).
        snapshot_at: [N, P] int32 or int64: the state after this many tokens of the call (0 to the sequence's length)
            is written to the slot in ``snapshot_slots``, for prefix caching. Other values write nothing.
        snapshot_slots: [N, P] int32 or int64, distinct rows of ``state``, none of them in ``slots``; negative: none.
        batch_invariant: give a prompt's outputs and states the bits of ``lightning_attention(batch_invariant=True)`` on
            the whole prompt, whatever else is in the batch and in however many calls it is read: every call but the
            prompt's last must bring a multiple of ``lightning_attention.INVARIANT_CHUNK`` tokens of it, because the
            state at the next multiple cannot be had to the bit from one elsewhere. The pool must be float32 (float64
            for float64 inputs). A snapshot has the bits that a call would leave which ended there. Single tokens are
            read as prompts are, not as decode does. docs/numerics.md has more, and the price.
        recent: the pool's rings of recent tokens. What those of the slots in the call hold goes into the states first,
            or is dropped where a sequence is ``fresh``. A sequence of one token may have it appended to its ring
            instead, as by decode. None: none.
        out: [T, H, E] of q's dtype, contiguous, no part of another argument: the outputs are written there, rows of
            padding are left alone, and ``out`` is returned. None: a new tensor, whose rows of padding are zero.

    Returns:
        [T, H, E] in q's dtype.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype other than the above.
        ValueError: a shape, stride or device does not fit, or an input requires grad; on the CPU also
            the numbers in cu_seqlens and the slots.
    """
    q, k, v = cast_for_autocast(q, k, v)
    pool, low, state_scale = planes(state)
    operation = prefill if out is None else prefill_out
    ring = tensors(recent)
    given = (
        q, k, v, log_decay, pool, cu_seqlens, slots, fresh, snapshot_at, snapshot_slots, *ring, low, state_scale, out
    )  # fmt: skip
    run = operation.known(given)
    if run is None:
        N = validation.check_packed(q, k, v, log_decay, pool, cu_seqlens, slots, low is not None)
        if fresh is not None:
            validation.check_index("fresh", fresh, (N,), "[N]", q, (torch.bool,))
        validation.check_snapshots(snapshot_at, snapshot_slots, N, q)
        check_recent(recent, pool, q)
        if out is not None:
            validation.check_out(out, v)
        run = operation.checked(given)
    if batch_invariant:  # or the bits would depend on where a prompt's calls end, which round the state
        validation.check_dtype("state of a call with batch_invariant", pool, (validation.state_dtype(q),))
    scale = validation.checked_scale(scale, q)
    backend = backends.choose(None, q.device)
    inputs = (
        q, k, v, log_decay, pool, cu_seqlens, slots, fresh, scale, snapshot_at, snapshot_slots, batch_invariant,
        *ring, low, state_scale, backend,
    )  # fmt: skip
    if out is None:
        return run(*inputs)
    run(*inputs, out)
    return out


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, slots: Tensor | None,
    fresh: Tensor | None, scale: float, snapshot_at: Tensor | None, snapshot_slots: Tensor | None,
    batch_invariant: bool, recent_k: Tensor | None, recent_v: Tensor | None, recent_count: Tensor | None,
    state_low: Tensor | None, state_scale: Tensor | None, backend: str, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    validation.check_cu_seqlens_values(cu_seqlens, q.shape[0])
    validation.check_slot_values(slots, state.shape[0], snapshot_slots)
    validation.check_log_decay_values(log_decay)
    run = backends.get(backend)
    args = (q, k, v, log_decay, state, cu_seqlens, slots, fresh, scale, snapshot_at, snapshot_slots, batch_invariant)
    if recent_count is None and state_low is None:  # what either returns is None where out is given
        return run.prefill(*args, out)  # type: ignore[return-value]
    return run.prefill_recent(  # type: ignore[return-value]
        *args, recent_k, recent_v, recent_count, state_low, state_scale, out
    )


prefill = Operation(_prefill, like_v, writes=WRITTEN)
prefill_out = Operation(_prefill, nothing, writes=[*WRITTEN, "out"], into_out=True)
