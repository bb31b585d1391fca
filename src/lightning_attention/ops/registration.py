"""The operations as PyTorch sees them: torch.library definitions, fake tensors, autograd.

An operator must return a fixed number of tensors, so what a call did not ask for comes back with no elements.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lightning_attention.ops import backends, transforms, validation

_library = torch.library.Library("lightning_attention", "DEF")


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


#: What computes each operation, with None for what was not asked for.
_implementations: dict[str, Callable[..., Any]] = {}


def _implement(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    @wraps(run)
    def without_autocast(*args: Any) -> Any:
        # The facade has cast q, k and v. Autocast is still on in here, where it would round states and decays as well.
        if not torch._C._is_any_autocast_enabled():
            return run(*args)
        with torch.autocast(args[0].device.type, enabled=False):
            return run(*args)

    def operator(*args: Any) -> Any:
        results = without_autocast(*args)
        if not isinstance(results, tuple):
            return results
        return tuple(_absent(args[0]) if x is None else x for x in results)

    _implementations[name] = without_autocast
    _library.impl(name, operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lightning_attention::{name}", fake, lib=_library)


# attention: training and prefill of whole sequences

_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool output_final_state, bool batch_invariant, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
    "Tensor? initial_state, Tensor? cu_seqlens, float scale, bool batch_invariant, bool need_dlog_decay, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    batch_invariant: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    validation.check_cu_seqlens_values(cu_seqlens, q.shape[1])
    validation.check_log_decay_values(log_decay)
    run = backends.get(backend).attention
    return run(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,  # noqa: ARG001
    initial_state: Tensor | None,  # noqa: ARG001
    cu_seqlens: Tensor | None,
    scale: float,  # noqa: ARG001
    output_final_state: bool,
    batch_invariant: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    out = v.new_empty(v.shape)
    if not output_final_state:
        return out, _absent(q)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return out, q.new_empty(N, *k.shape[2:], v.shape[3], dtype=validation.state_dtype(q))


def _attention_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    batch_invariant: bool,
    need_dlog_decay: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    run = backends.get(backend).attention_backward
    dq, dk, dv, dlog_decay, dinitial = run(
        dout, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, batch_invariant, need_dlog_decay
    )
    if dlog_decay is not None:
        dlog_decay = None if log_decay is None or not need_dlog_decay else dlog_decay.to(log_decay.dtype)
    return dq, dk, dv, dlog_decay, dinitial


def _attention_backward_fake(
    dout: Tensor,  # noqa: ARG001
    dfinal: Tensor | None,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    batch_invariant: bool,  # noqa: ARG001
    need_dlog_decay: bool,
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    dlog_decay = _absent(q) if not need_dlog_decay or log_decay is None else log_decay.new_empty(log_decay.shape)
    dinitial = _absent(q) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlog_decay, dinitial


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
    run = _operator if transforms.are_batched(dout, dfinal) else call
    dq, dk, dv, dlog_decay, dinitial = run("attention_backward", *inputs)
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
        def attention(*inputs: Any) -> Any:
            return call("attention", *inputs)

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


#: For each operation its derivative, the one under transforms, and how many of its arguments, the first, are tensors.
_functions = {
    "attention": (_Attention, _TransformedAttention, 6),
    "attention_backward": (_AttentionBackward, _TransformedAttentionBackward, 8),
}


def call(name: str, *inputs: Any) -> Any:
    """The operator; where nothing is watching, straight to autograd and the kernels, past 30 µs of dispatcher.

    What was not asked for is then None instead of a tensor with no elements.
    """
    if not _watched(inputs[0]):
        return _autograd(name, _implementations[name], inputs)
    if transforms.active() and not torch.compiler.is_compiling():
        # Here and not below the dispatcher, where a transform can no longer take the function apart.
        return _functions[name][1].apply(getattr(torch.ops.lightning_attention, name).default, *inputs)
    return _operator(name, *inputs)


def _operator(name: str, *inputs: Any) -> Any:
    if inputs[0].is_nested:
        validation.check_tensor("k" if name == "commit" else "q", inputs[0])
    return getattr(torch.ops.lightning_attention, name).default(*inputs)


def _watched(x: Tensor) -> bool:
    """Whether a compiler, a mode, a transform or a tensor subclass wants to see the operator itself."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or transforms.active()
    )


def _autograd(name: str, run: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    function, transformed, count = _functions[name]
    if transforms.active():
        transforms.refuse_operator(name)
        return transformed.apply(run, *inputs)
    if torch.is_grad_enabled():
        for x in inputs[:count]:
            if x is not None and x.requires_grad:
                return function.apply(run, inputs[count:], *inputs[:count])
    return run(*inputs)


def _register_autograd(name: str) -> None:
    # What torch.library.register_autograd does, less its 80 µs a call of filling in defaults and flattening.
    def below(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.lightning_attention, name).default(*inputs)

    _library.impl(name, lambda *inputs: _autograd(name, below, inputs), "Autograd")


_implement("attention", _attention, _attention_fake)
_implement("attention_backward", _attention_backward, _attention_backward_fake)
_register_autograd("attention")
_register_autograd("attention_backward")
transforms.register_vmap(_library, "attention")
transforms.register_vmap(_library, "attention_backward")


# Serving: one pool of states, updated in place


def serve(name: str, *inputs: Any) -> Any:
    """As ``call``, for operations without a derivative."""
    if _watched(inputs[0]):
        return _operator(name, *inputs)
    return _implementations[name](*inputs)


_library.define(
    "decode(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, Tensor? slots, float scale, "
    "str backend) -> Tensor"
)
_library.define(
    "prefill(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, Tensor cu_seqlens, Tensor? slots, "
    "Tensor? fresh, float scale, Tensor? snapshot_at, Tensor? snapshot_slots, str backend) -> Tensor"
)
_library.define(
    "verify(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor state, Tensor cu_seqlens, Tensor? slots, "
    "Tensor? parents, float scale, str backend) -> Tensor"
)
_library.define(
    "commit(Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, Tensor cu_seqlens, Tensor accepted, "
    "Tensor? slots, Tensor? parents, str backend) -> ()"
)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    validation.check_slot_values(slots, state.shape[0])
    validation.check_log_decay_values(log_decay)
    return backends.get(backend).decode(q, k, v, log_decay, state, slots, scale)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    fresh: Tensor | None,
    scale: float,
    snapshot_at: Tensor | None,
    snapshot_slots: Tensor | None,
    backend: str,
) -> Tensor:
    validation.check_cu_seqlens_values(cu_seqlens, q.shape[0])
    validation.check_slot_values(slots, state.shape[0], snapshot_slots)
    validation.check_log_decay_values(log_decay)
    run = backends.get(backend).prefill
    return run(q, k, v, log_decay, state, cu_seqlens, slots, fresh, scale, snapshot_at, snapshot_slots)


def _verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    parents: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    validation.check_cu_seqlens_values(cu_seqlens, q.shape[0])
    validation.check_slot_values(slots, state.shape[0])
    validation.check_parents_values(parents, cu_seqlens)
    validation.check_log_decay_values(log_decay)
    run = backends.get(backend).verify
    return run(q, k, v, log_decay, state, cu_seqlens, slots, parents, scale)


def _commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    accepted: Tensor,
    slots: Tensor | None,
    parents: Tensor | None,
    backend: str,
) -> None:
    validation.check_cu_seqlens_values(cu_seqlens, k.shape[0])
    validation.check_slot_values(slots, state.shape[0])
    validation.check_parents_values(parents, cu_seqlens)
    validation.check_accepted_values(accepted, parents, cu_seqlens, slots)
    validation.check_log_decay_values(log_decay)
    backends.get(backend).commit(k, v, log_decay, state, cu_seqlens, accepted, slots)


def _outputs_fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:  # noqa: ARG001
    return v.new_empty(v.shape)


_implement("decode", _decode, _outputs_fake)
_implement("prefill", _prefill, _outputs_fake)
_implement("verify", _verify, _outputs_fake)
_implement("commit", _commit, lambda *args: None)  # noqa: ARG005
for _name in ("decode", "prefill", "verify", "commit"):
    transforms.refuse_vmap(_library, _name)
