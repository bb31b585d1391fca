"""The recurrence S_t = λ S_{t-1} + k_tᵀ v_t, o_t = scale · q_t S_t, token by token in float64, and its derivatives."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_attention.kernels import pool


class _Sequences:
    """Where the sequences of a dense or packed batch begin and end, answered one token at a time, on the device."""

    def __init__(self, cu_seqlens: Tensor | None, T: int) -> None:
        self.cu_seqlens, self.T = cu_seqlens, T

    def enter(self, t: int, state: Tensor, fresh: Tensor) -> Tensor:
        """The state before token t: [N, H, D, E] ``fresh`` of a sequence that begins there, else as it was."""
        if self.cu_seqlens is None:
            return fresh if t == 0 else state
        begins = (self.cu_seqlens[:-1] == t) & (self.cu_seqlens[1:] > t)
        return torch.where(begins.any(), fresh[begins.int().argmax()[None]], state[:1])

    def leave(self, t: int, state: Tensor, last: Tensor) -> Tensor:
        """``last`` [N, H, D, E] with the state after token t where a sequence ends there."""
        if self.cu_seqlens is None:
            return state if t == self.T - 1 else last
        ends = (self.cu_seqlens[1:] == t + 1) & (self.cu_seqlens[:-1] <= t)
        return torch.where(ends[:, None, None, None], state, last)

    def reversed(self) -> "_Sequences":
        """The same sequences with time running backwards, N of them in reverse order, padding first."""
        return _Sequences(None if self.cu_seqlens is None else self.T - self.cu_seqlens.flip(0), self.T)

    def mask(self, x: Tensor) -> Tensor:
        """Zero the padding tokens of [B, T, H, X], those past the last sequence."""
        if self.cu_seqlens is None:
            return x
        inside = torch.arange(self.T, device=x.device) < self.cu_seqlens[-1]
        return torch.where(inside[:, None, None], x, 0.0)


def _each_state(
    k: Tensor, v: Tensor, decay: Tensor, start: Tensor, sequences: _Sequences
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each token, the state [B, H, D, E] before it and after it."""
    after = start
    for t in range(k.shape[1]):
        before = sequences.enter(t, after, start)
        after = decay * before + k[:, t, :, :, None] * v[:, t, :, None, :]
        yield before, after


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, _Sequences]:
    q, k = pool.repeated(q, v), pool.repeated(k, v)
    B, T, H, D = k.shape
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    sequences = _Sequences(cu_seqlens, T)
    q, k, v = (sequences.mask(x.double()) for x in (q, k, v))
    decay = q.new_ones(H, 1, 1) if log_decay is None else log_decay.double().exp()[:, None, None]
    start = q.new_zeros(N, H, D, v.shape[-1]) if initial_state is None else initial_state.double()
    return q, k, v, decay, start, sequences


def _stacked(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows, 1).contiguous() if rows else like.new_zeros(like.shape)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, E] and final states [N, H, D, E] in float64; autograd can follow it."""
    q, k, v, decay, start, sequences = _prepare(q, k, v, log_decay, initial_state, cu_seqlens)
    final, outputs = start, []
    for t, (_, state) in enumerate(_each_state(k, v, decay, start, sequences)):
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
        final = sequences.leave(t, state, final)
    return sequences.mask(_stacked(outputs, v)), final


def attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, batch_invariant: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs in the inputs' dtype, and final states in float32 (float64)."""
    out, final = recurrence(q, k, v, log_decay, initial_state, cu_seqlens, scale)
    if not output_final_state:
        return out.to(v.dtype), None
    return out.to(v.dtype), _own(final, pool.accumulator(v))


def states(
    k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, batch_invariant: bool,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    """[N, H, D, E]: Σ_t λ^(n−1−t) k_tᵀ v_t for each sequence of n tokens; ``reverse``: Σ_t λ^(t+1) k_tᵀ v_t."""
    dtype = pool.accumulator(v)
    _, k, v, decay, start, sequences = _prepare(k, k, v, log_decay, None, cu_seqlens)
    if reverse:
        k, v, sequences = k.flip(1), v.flip(1), sequences.reversed()
    final = start
    for t, (_, state) in enumerate(_each_state(k, v, decay, start, sequences)):
        final = sequences.leave(t, state, final)
    if reverse:
        final = decay * (final if cu_seqlens is None else final.flip(0))
    return _own(final, dtype)


def _own(state: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of its own, whatever the strides of the state that the recurrence started from."""
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)


def attention_backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, batch_invariant: bool, need_dlog_decay: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, log_decay [H] and initial_state [N, H, D, E].

    With G_t the gradient of S_t: dq_t = scale · do_t S_tᵀ, and, backwards in time, G_t = λ G_{t+1} + scale · q_tᵀ do_t,
    dk_t = v_t G_tᵀ, dv_t = k_t G_t. The decay goes forwards, so that no state need be kept: the derivative of S_t by
    log λ is R_t = λ (S_{t-1} + R_{t-1}), and the loss moves by Σ_t scale · q_t R_t do_tᵀ.
    """
    given = q, k, v
    q, k, v, decay, start, sequences = _prepare(q, k, v, log_decay, initial_state, cu_seqlens)
    g = scale * sequences.mask(dout.double())
    dend = torch.zeros_like(start) if dfinal is None else dfinal.double()

    dqs, drift, last_drift = [], torch.zeros_like(start), torch.zeros_like(start)
    dlog = q.new_zeros(q.shape[2])
    for t, (before, state) in enumerate(_each_state(k, v, decay, start, sequences)):
        dqs.append((state @ g[:, t, :, :, None]).squeeze(-1))
        if need_dlog_decay:
            drift = decay * (before + sequences.enter(t, drift, torch.zeros_like(start)))
            dlog = dlog + ((q[:, t, :, None, :] @ drift).squeeze(-2) * g[:, t]).sum((0, 2))
            last_drift = sequences.leave(t, drift, last_drift)
    if need_dlog_decay:
        dlog = dlog + (last_drift * dend).sum((0, 2, 3))

    # Backwards, the gradient of S_t before the step that made it (λ S_{t-1}) plays the state's part.
    dks, dvs, back, dstart = [], [], sequences.reversed(), dend.flip(0) if cu_seqlens is not None else dend
    grad, fresh = dstart, dstart
    for i in range(q.shape[1]):
        t = q.shape[1] - 1 - i
        here = back.enter(i, grad, fresh) + q[:, t, :, :, None] * g[:, t, :, None, :]
        dks.append((here @ v[:, t, :, :, None]).squeeze(-1))
        dvs.append((k[:, t, :, None, :] @ here).squeeze(-2))
        grad = decay * here
        dstart = back.leave(i, grad, dstart)
    if cu_seqlens is not None:
        dstart = dstart.flip(0)

    stacked = _stacked(dqs, q), _stacked(dks[::-1], k), _stacked(dvs[::-1], v)
    dq, dk, dv = (pool.summed(sequences.mask(x), like).to(like.dtype) for x, like in zip(stacked, given, strict=True))
    return (
        dq,
        dk,
        dv,
        dlog if need_dlog_decay else None,
        None if initial_state is None else _own(dstart, initial_state.dtype),
    )
