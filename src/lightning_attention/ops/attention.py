"""Attention over whole sequences: training and prefill."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_attention.ops import backends, transforms, validation
from lightning_attention.ops.operation import Differentiable, absent, cast_for_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LightningOutput(NamedTuple):
    """What ``lightning_attention`` returns: output [B, T, H, E], final_state [N, H, D, E] or None."""

    output: Tensor
    final_state: Tensor | None


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> LightningOutput:
    """Causal linear attention with a fixed decay per head, in time and memory linear in T.

    For each head, with λ = exp(log_decay) and S_0 the initial state::

        S_t = λ S_{t-1} + k_tᵀ v_t
        o_t = scale · q_t S_t

    computed in blocks as Lightning Attention-2 (arXiv 2401.04658) does, forward (Algorithm 1) and backward
    (Algorithm 2). Sums and states are kept in float32 (float64 for float64 inputs). Only the arguments are saved for
    the backward pass. There is no second derivative.

    Args:
        q: [B, T, Hk, D], bfloat16, float16, float32 or float64; any strides with a unit last one. Hk is H or divides
            it: with groups of H / Hk heads, as in grouped-query layers, head h of v goes with head h // (H / Hk) of q
            and k, which are not copied.
        k: [B, T, Hk, D], of q's dtype.
        v: [B, T, H, E], of q's dtype; E need not be D.
        log_decay: [H] float32 (or float64 for float64 inputs), natural logarithm of the decay per token, at
            most 0, which is checked on the CPU, where reading it costs nothing; −inf: no memory. None for no decay.
            May require grad. ``lightning_attention.decay`` has the schedules of published models.
        scale: factor on the output; the papers of lightning attention use 1, and None is D^(-1/2), as in softmax
            attention.
        initial_state: [N, H, D, E] float32, bfloat16 or float16 (or float64 for float64 inputs), the state before the
            first token of each sequence; None for zero. May require grad.
        output_final_state: whether to return the state after the last token of each sequence.
        cu_seqlens: [N+1] int32 or int64 on q's device, 0 = c_0 ≤ c_1 ≤ … ≤ c_N ≤ T: then B is 1, and sequence i is
            tokens c_i to c_{i+1} (possibly none). Tokens past c_N are padding: never read, their output is zero.
            None: every row of the batch is a sequence, and N = B. On backend "triton", where there are no states and
            batch_invariant is not set, sequences share blocks of tokens, and a NaN or inf in one can reach those next
            to it (docs/numerics.md).
        group: process group whose ranks, in order, hold consecutive slices of each sequence, this rank's being T
            tokens (T may differ, and be 0; with cu_seqlens, sequence i's slice is c_i to c_{i+1}, and N is the same on
            every rank). initial_state is the state before, and final_state the one after, the whole sequence, on every
            rank. The function differentiated is the sum of the ranks' losses: q, k and v get their gradients, and
            log_decay and initial_state get this rank's share, whose sum over the ranks is the gradient. Every rank
            must run the backward pass. docs/distributed.md says what travels.
        batch_invariant: make the bits of a sequence's outputs, states and gradients (but that of log_decay, a sum over
            the batch) independent of what else is in the batch: alone, in a batch, packed, and, of outputs and states,
            read by ``lightning_attention_prefill(batch_invariant=True)``. docs/numerics.md has the price.
        backend: "triton", "tiled" or "reference"; None chooses by device.

    Returns:
        LightningOutput(output, final_state): [B, T, H, E] in q's dtype, and [N, H, D, E] float32 (float64 for float64
        inputs) or None. Both are differentiable.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype other than the above; group is not a process group.
        ValueError: a shape, stride, device or backend does not fit, or, on the CPU, cu_seqlens or log_decay is not as
            above.
        NotImplementedError: a transform of ``torch.func`` or forward-mode differentiation asks for what there is not:
            tangents of log_decay, a second derivative, batches of cu_seqlens, or anything of that with a group.
    """
    q, k, v = cast_for_autocast(q, k, v)
    validation.check_inputs(q, k, v, log_decay, "BT")
    scale = validation.checked_scale(scale, q)
    num_sequences = q.shape[0]
    if cu_seqlens is not None:
        validation.check_cu_seqlens(cu_seqlens, q)
        if q.shape[0] != 1:
            raise ValueError(f"q has shape {list(q.shape)}; with cu_seqlens the batch B must be 1")
        num_sequences = cu_seqlens.shape[0] - 1
    validation.check_initial_state(initial_state, q, v, num_sequences)
    if initial_state is not None:
        initial_state = initial_state.to(validation.state_dtype(q))
    chosen = backends.choose(backend, q.device)
    if group is not None:
        transforms.refuse_group()
        from lightning_attention.ops.sequence_parallel import attention_over_ranks

        out, final = attention_over_ranks(
            q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant, chosen, group
        )
    else:
        out, final = attention(
            q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant, chosen
        )
    return LightningOutput(out, final if output_final_state else None)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, batch_invariant: bool, backend: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    validation.check_cu_seqlens_values(cu_seqlens, q.shape[1])
    validation.check_log_decay_values(log_decay)
    return backends.get(backend).attention(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant
    )


def new_states(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for a state of each sequence."""
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(N, v.shape[2], k.shape[3], v.shape[3], dtype=validation.state_dtype(k))


def _attention_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, k, v, _, _, cu_seqlens, _, output_final_state, *_ = inputs
    return v.new_empty(v.shape), new_states(k, v, cu_seqlens) if output_final_state else absent(q)


def _attention_backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, batch_invariant: bool, need_dlog_decay: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    dq, dk, dv, dlog_decay, dinitial = backends.get(backend).attention_backward(
        dout, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, batch_invariant, need_dlog_decay
    )
    return dq, dk, dv, gradient_of_decay(dlog_decay, log_decay, need_dlog_decay), dinitial


def gradient_of_decay(found: Tensor | None, log_decay: Tensor | None, needed: bool) -> Tensor | None:
    """What a backend found, of log_decay's type; None where that is not asked for."""
    return None if found is None or log_decay is None or not needed else found.to(log_decay.dtype)


def _attention_backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    dout, _, q, k, v, log_decay, initial_state, *_, need_dlog_decay, _ = inputs
    like = q, k, v, log_decay if need_dlog_decay else None, initial_state
    return tuple(absent(dout) if x is None else x.new_empty(x.shape) for x in like)


def _attention_gradients(
    ctx: Any, dout: Tensor | None, dfinal: Tensor | None, need_dlog_decay: bool
) -> tuple[Tensor | None, ...]:
    """What the backward passes of ``attention`` return for its six tensors."""
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    scale, has_final, batch_invariant, backend = ctx.options
    if not has_final:
        dfinal = None  # the absent tensor's
    if dout is None:
        if dfinal is None:
            return (None,) * 6
        dout = torch.zeros_like(v)
    inputs = (
        dout, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, batch_invariant, need_dlog_decay, backend,
    )  # fmt: skip
    # A batch of gradients (``is_grads_batched``) is one to PyTorch's dispatcher alone, which takes them one by one.
    run = attention_backward.dispatch if transforms.are_batched(dout, dfinal) else attention_backward
    dq, dk, dv, dlog_decay, dinitial = run(*inputs)
    return (
        dq, dk, dv, dlog_decay if need_dlog_decay else None, None if initial_state is None else dinitial, None,
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], options: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return run(*tensors, *options)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_attention_gradients(ctx, dout, dfinal, ctx.needs_input_grad[5])


class _TransformedAttention(torch.autograd.Function):
    """The same in the form that transforms can take apart: 50 µs more a call, so only they get it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run: Callable[..., Any], *inputs: Any) -> tuple[Tensor, Tensor | None]:
        return run(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:  # noqa: ARG004
        tensors, ctx.options = inputs[1:7], inputs[7:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_attention_gradients(ctx, dout, dfinal, ctx.needs_input_grad[4]), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _run: None, *directions: Any) -> tuple[Tensor, Tensor | None]:
        return transforms.tangents(attention, ctx.saved_tensors, ctx.options, directions[:6])


_NO_SECOND = "lightning_attention has no second derivative; call backward without create_graph=True"


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004
        run: Callable[..., Any],
        options: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return run(*tensors, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(_NO_SECOND)


class _TransformedAttentionBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(run: Callable[..., Any], *inputs: Any) -> tuple[Tensor | None, ...]:
        return run(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(_NO_SECOND)

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> None:
        raise NotImplementedError(_NO_SECOND)


# Axes of: q, k, v, log_decay, initial_state, cu_seqlens; out, final
attention = Differentiable(
    _attention,
    _attention_fake,
    _Attention,
    _TransformedAttention,
    transforms.Heads((2, 2, 2, 0, 1, None), (2, 1)),
)
# dout, dfinal, and then as above; dq, dk, dv, dlog_decay, dinitial
attention_backward = Differentiable(
    _attention_backward,
    _attention_backward_fake,
    _AttentionBackward,
    _TransformedAttentionBackward,
    transforms.Heads((2, 1, 2, 2, 2, 0, 1, None), (2, 2, 2, 0, 1)),
)
