"""Lightning Attention-2 (arXiv 2401.04658, Algorithms 1 and 2) in four sweeps, shared out by heads."""

from collections.abc import Callable, Iterator

from torch import Tensor

from lightning_attention.kernels.pool import summed
from lightning_attention.kernels.tiled.plan import LINE, Plan, Share, empty, left, narrowed, whole_lines
from lightning_attention.kernels.tiled.sweep import Drift, sweep


def attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, batch_invariant: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs [B, T, H, E] and final states [N, H, D, E]."""
    D, E = k.shape[3], v.shape[3]
    if batch_invariant and (D % LINE or E % LINE):
        q, k, v, initial_state = whole_lines(q), whole_lines(k), whole_lines(v), whole_lines(initial_state, 2)
        out, final = attention(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, True)
        return narrowed(out, E), None if final is None else narrowed(final, D, E)
    plan = Plan(k, v, log_decay, cu_seqlens, scale, batch_invariant)
    out = empty(v, cu_seqlens, E)
    final = left(initial_state, v, cu_seqlens, D, E) if output_final_state else None

    def task(share: Share) -> Callable[[Tensor], None]:
        tokens, states = share.tokens, share.states
        return lambda space: sweep(
            share.run, space, share.keys(q), share.keys(k), tokens(v), tokens(out),
            given=states(initial_state), leave=states(final),
        )  # fmt: skip

    plan.run([task(share) for share in plan.shares], D, E)
    return out, final


def attention_backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, batch_invariant: bool, need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, log_decay [H] and initial_state [N, H, D, E] (None where there is none)."""
    D, E = k.shape[3], v.shape[3]
    if batch_invariant and (D % LINE or E % LINE):
        q, k, v, dout = (whole_lines(x) for x in (q, k, v, dout))
        dfinal, initial_state = whole_lines(dfinal, 2), whole_lines(initial_state, 2)
        dq, dk, dv, dlog, dinitial = attention_backward(
            dout, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, True, need_dlog_decay
        )
        return (
            narrowed(dq, D),
            narrowed(dk, D),
            narrowed(dv, E),
            dlog,
            None if dinitial is None else narrowed(dinitial, D, E),
        )
    plan = Plan(k, v, log_decay, cu_seqlens, scale, batch_invariant)
    # Those of q and k for each head of v.
    dq, dk, dv = (empty(v, cu_seqlens, width) for width in (D, D, E))
    dinitial = None if initial_state is None else left(dfinal, v, cu_seqlens, D, E)
    # A row a share, added up in their order.
    dlog = k.new_zeros(len(plan.shares), v.shape[2], dtype=plan.dtype) if need_dlog_decay else None

    def tasks(share: Share, i: int) -> Iterator[Callable[[Tensor], None]]:
        run, states = share.run, share.states
        g, q_, k_, v_ = share.tokens(dout), share.keys(q), share.keys(k), share.tokens(v)
        initial, dend = states(initial_state), states(dfinal)
        across = None if dend is None else dend.mT

        def dq_and_dlog(space: Tensor) -> None:
            drift = None if dlog is None else Drift(q_, across, share.heads(dlog[i]))
            given = None if initial is None else initial.mT
            sweep(run, space, g, v_, k_, share.tokens(dq), given=given, drift=drift)

        yield dq_and_dlog
        yield lambda space: sweep(run, space, v_, g, q_, share.tokens(dk), given=across, reverse=True)
        yield lambda space: sweep(
            run, space, k_, q_, g, share.tokens(dv), given=dend, leave=states(dinitial), reverse=True
        )

    plan.run([task for i, share in enumerate(plan.shares) for task in tasks(share, i)], D, E, drift=need_dlog_decay)
    return summed(dq, q), summed(dk, k), dv, None if dlog is None else dlog.sum(0), dinitial
