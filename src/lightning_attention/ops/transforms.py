"""What the transforms of ``torch.func`` and forward-mode differentiation do with the operations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Heads(NamedTuple):
    """Which axis has the heads, of each tensor among an operator's arguments, the first ones, and of its results.

    None is for cu_seqlens, which has no heads and is the last of the tensors.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]


def active() -> bool:
    """Whether a transform, or forward-mode differentiation, wants to see the operation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def are_batched(*tensors: Tensor | None) -> bool:
    """Whether any is a batch of what it looks like, as ``torch.autograd.grad`` makes for ``is_grads_batched``."""
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


def has_tangent(x: Tensor | None) -> bool:
    """Whether forward-mode differentiation follows x."""
    return x is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def refuse_operator(name: str) -> None:
    """Raise a clear error: PyTorch's own, of a function that a transform meets below the dispatcher, helps nobody."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"torch.ops.lightning_attention.{name} cannot be differentiated by torch.func; call the function "
            "lightning_attention"
        )


def refuse_group() -> None:
    """Every rank would have to transform alike, and what travels does not say so."""
    if active():
        raise NotImplementedError(
            "lightning_attention with a group has no torch.func transform and no forward-mode derivative; "
            "differentiate it with backward() or torch.autograd.grad"
        )


def register_vmap(library: torch.library.Library, name: str, heads: Heads) -> None:
    """The samples of a batch become heads: they share no state, and each has its own log_decay and its gradient."""
    inputs, outputs = heads
    operator = getattr(torch.ops.lightning_attention, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size, count = info.batch_size, len(inputs)
        if in_dims[count - 1] is not None:
            raise NotImplementedError(
                "cu_seqlens differs between the samples of a vmap; one pack of all their sequences has no such limit"
            )
        tensors = [
            x if x is None or axis is None else _as_heads(x, dim, axis, size)
            for x, dim, axis in zip(args, in_dims, inputs, strict=False)
        ]
        results = operator(*tensors, *args[count:])
        # What was not asked for has no elements, and no axis.
        absent = [x.ndim <= axis for x, axis in zip(results, outputs, strict=True)]
        values = [
            x if gone else x.unflatten(axis, (size, -1)) for x, axis, gone in zip(results, outputs, absent, strict=True)
        ]
        return tuple(values), tuple(None if gone else axis for axis, gone in zip(outputs, absent, strict=True))

    torch.library.register_vmap(f"lightning_attention::{name}", rule, lib=library)


def _as_heads(x: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """[…, H, …], with the samples at ``dim`` or without them -> […, samples · H, …]."""
    x = x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:]) if dim is None else x.movedim(dim, axis)
    return x.flatten(axis, axis + 1)


def refuse_vmap(library: torch.library.Library, name: str) -> None:
    """Refuse vmap, for operations on one pool of states and others without a rule."""

    def rule(*_: Any) -> Any:
        raise NotImplementedError(
            f"lightning_attention_{name} has no vmap, because its sequences share what it works on: call it once, with "
            "the samples among its sequences"
        )

    torch.library.register_vmap(f"lightning_attention::{name}", rule, lib=library)


def tangents(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    directions: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor | None]:
    """The derivative of ``attention``, output and final state, where its tensors move in these directions.

    It is linear in q, in k, and in v and the initial state together, so each term is the same recurrence again.

    Raises:
        NotImplementedError: log_decay moves.
    """
    q, k, v, log_decay, initial, cu_seqlens = tensors
    dq, dk, dv, dlog_decay, dinitial, _ = directions
    if dlog_decay is not None:
        raise NotImplementedError(
            "lightning_attention has no forward-mode derivative by log_decay; it has one in reverse mode (backward(), "
            "torch.func.grad, jacrev)"
        )

    def term(a: Tensor, b: Tensor, c: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return attention(a, b, c, log_decay, start, cu_seqlens, *options)

    assert q is not None
    assert k is not None
    assert v is not None
    terms: list[tuple[Tensor, Tensor | None]] = []
    if dq is not None:
        out, final = term(dq, k, v, initial)
        terms.append((out, None if final is None else torch.zeros_like(final)))  # the state does not depend on q
    if dk is not None:
        terms.append(term(q, dk, v, dinitial))
        dinitial = None
    if dv is not None or dinitial is not None:
        terms.append(term(q, k, torch.zeros_like(v) if dv is None else dv, dinitial))
    outs, finals = zip(*terms, strict=True)
    return sum(outs[1:], start=outs[0]), None if finals[0] is None else sum(finals[1:], start=finals[0])
