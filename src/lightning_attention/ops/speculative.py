"""Speculative decoding: look at drafts without touching the state, then fold in what was accepted."""

import torch
from torch import Tensor

from lightning_attention.ops import backends, validation
from lightning_attention.ops.operation import Operation, cast_for_autocast, like_v, nothing
from lightning_attention.ops.quantized import QuantizedStates, check_has_rings, planes
from lightning_attention.ops.recent import WRITTEN, RecentTokens, check_recent, tensors


def lightning_attention_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | QuantizedStates,
    *,
    cu_seqlens: Tensor,
    slots: Tensor | None = None,
    parents: Tensor | None = None,
    scale: float | None = 1.0,
    recent: RecentTokens | None = None,
    snapshots: Tensor | None = None,
    snapshot_slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Outputs of draft tokens, each following its ancestors and the state of its sequence, which is not touched.

    A draft at depth d (1 for a child of the state), with ancestors-or-self a at depths d_a, gives
    ``o = scale · q (λ^d S + Σ_a λ^(d − d_a) k_aᵀ v_a)``. Not differentiable.

    Args:
        q: [T, Hk, D], the drafts of N sequences, packed; bfloat16, float16 or float32 or, on a CPU, float64. Hk is H or
            divides it, as in ``lightning_attention``.
        k: [T, Hk, D], of q's dtype.
        v: [T, H, E], of q's dtype.
        log_decay: [H] float32, natural logarithm of the decay, at most 0 (checked on the CPU); −inf: no memory.
            None for no decay.
        state: [S, H, D, E] float32, bfloat16 or float16 or, for float64 inputs, float64, the pool; read only. Or
            QuantizedStates, the pool in 8 bits, with ``recent``.
        cu_seqlens: [N+1] int32 or int64: sequence i has the drafts c_i to c_{i+1}, possibly none.
        slots: [N] int32 or int64, the row of ``state`` that each sequence owns; negative: padding. None: row i, S = N.
        parents: [T] int32 or int64, each draft's parent as its place among the drafts of its sequence, an earlier
            one, or -1 for the state. None: every draft follows the one before it. ``lightning_attention.trees`` makes
            them from masks and from links.
        scale: factor on the output; None for D^(-1/2).
        recent: the pool's rings of recent tokens, read only; the drafts follow what they hold. Not together with
            ``snapshots``. None: none.
        snapshots: [R, H, D, E], of a dtype that ``state`` may have: the state after each draft is written there,
            rounded once. Whoever keeps them copies the last accepted one in place of ``lightning_attention_commit``.
            It may be ``state`` itself, and the rows named may be the sequence's own: its state is read before. Not
            possible with ``recent``, and so not with QuantizedStates.
        snapshot_slots: [N, P] int32 or int64, with ``snapshots``: the row of them for draft 0 to P − 1 of each
            sequence, all distinct; negative: none. Those of drafts that are not there are not looked at.
        out: [T, H, E] of q's dtype, contiguous, no part of another argument: the outputs are written there, rows of
            padding (those of a sequence without slot, and past c_N) are left alone, and ``out`` is returned. None: a
            new tensor, whose rows of padding are zero.

    Returns:
        [T, H, E] in q's dtype.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype other than the above.
        ValueError: a shape, stride or device does not fit, or an input requires grad; on the CPU also
            the numbers in the index tensors.
    """
    q, k, v = cast_for_autocast(q, k, v)
    pool, low, state_scale = planes(state)
    operation = verify if out is None else verify_out
    ring = tensors(recent)
    given = (
        q, k, v, log_decay, pool, cu_seqlens, slots, parents, snapshots, snapshot_slots, *ring, low, state_scale, out
    )  # fmt: skip
    run = operation.known(given)
    if run is None:
        validation.check_packed(q, k, v, log_decay, pool, cu_seqlens, slots, low is not None)
        if parents is not None:
            validation.check_index("parents", parents, (q.shape[0],), "[T]", q)
        if low is not None and not (snapshots is snapshot_slots is None):
            raise ValueError(
                "snapshots are asked for and state is QuantizedStates, of which there are none; use "
                "lightning_attention_commit, which takes up what is accepted"
            )
        validation.check_draft_snapshots(snapshots, snapshot_slots, cu_seqlens.shape[0] - 1, q, v)
        check_has_rings(state, recent)
        check_recent(recent, pool, q)
        if recent is not None and snapshots is not None:
            raise ValueError(
                "snapshots and recent are both given; fold the rings first, or commit what is accepted to them"
            )
        if out is not None:
            validation.check_out(out, v)
        run = operation.checked(given)
    scale = validation.checked_scale(scale, q)
    backend = backends.choose(None, q.device)
    inputs = (
        q, k, v, log_decay, pool, cu_seqlens, slots, parents, scale, snapshots, snapshot_slots, *ring, low,
        state_scale, backend,
    )  # fmt: skip
    if out is None:
        return run(*inputs)
    run(*inputs, out)
    return out


def _verify(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, slots: Tensor | None,
    parents: Tensor | None, scale: float, snapshots: Tensor | None, snapshot_slots: Tensor | None,
    recent_k: Tensor | None, recent_v: Tensor | None, recent_count: Tensor | None, state_low: Tensor | None,
    state_scale: Tensor | None, backend: str, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    validation.check_cu_seqlens_values(cu_seqlens, q.shape[0])
    validation.check_slot_values(slots, state.shape[0])
    validation.check_parents_values(parents, cu_seqlens)
    validation.check_draft_snapshot_values(snapshot_slots, snapshots, cu_seqlens)
    validation.check_log_decay_values(log_decay)
    run = backends.get(backend)
    if recent_count is None:
        return run.verify(  # type: ignore[return-value]  # None where out is given, as below
            q, k, v, log_decay, state, cu_seqlens, slots, parents, scale, snapshots, snapshot_slots, out
        )
    return run.verify_recent(  # type: ignore[return-value]
        q, k, v, log_decay, state, cu_seqlens, slots, parents, scale, recent_k, recent_v, recent_count, state_low,
        state_scale, out,
    )  # fmt: skip


verify = Operation(_verify, like_v, writes=["snapshots"])
verify_out = Operation(_verify, nothing, writes=["snapshots", "out"], into_out=True)


def lightning_attention_commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | QuantizedStates,
    *,
    cu_seqlens: Tensor,
    accepted: Tensor,
    slots: Tensor | None = None,
    parents: Tensor | None = None,
    recent: RecentTokens | None = None,
) -> None:
    """Fold the accepted drafts into the states, in place, as if they had been decoded one by one.

    Not differentiable.

    Args:
        k: [T, Hk, D], the drafts of N sequences, packed, as given to ``lightning_attention_verify``.
        v: [T, H, E], of k's dtype.
        log_decay: [H] float32, natural logarithm of the decay, at most 0 (checked on the CPU); −inf: no memory.
            None for no decay.
        state: [S, H, D, E] float32, bfloat16 or float16 or, for float64 inputs, float64, the pool; a 16-bit row is
            rounded once, at the end of the call. Or QuantizedStates, the pool in 8 bits, with ``recent``.
        cu_seqlens: [N+1] int32 or int64: sequence i has the drafts c_i to c_{i+1}.
        accepted: [T] bool, for each sequence the drafts on one path from its state: of a chain the first so many.
        slots: [N] int32 or int64, the row of ``state`` that each sequence owns; negative: padding. None: row i, S = N.
        parents: [T] int32 or int64, as given to ``lightning_attention_verify``; None: chains. Used to find a path with
            a hole in it, on the CPU alone.
        recent: the pool's rings of recent tokens, to which the drafts are appended: the states of those heads alone are
            written whose turn it is on the way. None: the states are written.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype other than the above.
        ValueError: a shape, stride or device does not fit, or an input requires grad; on the CPU also
            the numbers in the index tensors.
    """
    k, v = cast_for_autocast(k, v)
    pool, low, state_scale = planes(state)
    given = k, v, log_decay, pool, cu_seqlens, accepted, slots, parents, *tensors(recent), low, state_scale
    run = commit.known(given)
    if run is None:
        validation.check_kv(k, v, "T")
        validation.check_cu_seqlens(cu_seqlens, k)
        N = cu_seqlens.shape[0] - 1
        validation.check_no_grad(k=k, v=v, log_decay=log_decay, state=pool)
        validation.check_log_decay(log_decay, v)
        validation.check_pool(pool, k, v, slots, N, low is not None)
        validation.check_index("accepted", accepted, (k.shape[0],), "[T]", k, (torch.bool,))
        if parents is not None:
            validation.check_index("parents", parents, (k.shape[0],), "[T]", k)
        check_has_rings(state, recent)
        check_recent(recent, pool, k)
        run = commit.checked(given)
    run(*given, backends.choose(None, k.device))


def _commit(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, accepted: Tensor,
    slots: Tensor | None, parents: Tensor | None, recent_k: Tensor | None, recent_v: Tensor | None,
    recent_count: Tensor | None, state_low: Tensor | None, state_scale: Tensor | None, backend: str,
) -> None:  # fmt: skip
    validation.check_cu_seqlens_values(cu_seqlens, k.shape[0])
    validation.check_slot_values(slots, state.shape[0])
    validation.check_parents_values(parents, cu_seqlens)
    validation.check_accepted_values(accepted, parents, cu_seqlens, slots)
    validation.check_log_decay_values(log_decay)
    run = backends.get(backend)
    if recent_count is None:
        run.commit(k, v, log_decay, state, cu_seqlens, accepted, slots)
        return
    run.commit_recent(
        k, v, log_decay, state, cu_seqlens, accepted, slots, recent_k, recent_v, recent_count, state_low, state_scale
    )


commit = Operation(_commit, nothing, writes=WRITTEN)
