"""The cross entropy of a linear layer's outputs, without ever holding all of these outputs in memory.

PyTorch 2.13 has ``torch.nn.functional.linear_cross_entropy``. It is not used: its loss has the dtype of the hidden
states (in bfloat16 8.3125 for 8.357), the gradient of a bfloat16 weight had four times the error of plain PyTorch's,
and ``torch.compile`` cannot take it in one graph.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_attention.ops import backends, validation

# Bytes of logits that are in memory at a time. Every chunk reads and writes the gradient of the weight, 12 bytes an
# element. H200, bfloat16, 32,768 tokens, D 1024, V 64,000, forward and backward: 22.8 ms with 1 GiB, 27.7 with a
# quarter and 24.5 with half of it, 23.8 with twice and 22.9 with four times as much. A CPU wants what its caches hold;
# there are two or three buffers of this size.
BUDGETS = {"cuda": 1 << 30}
BUDGET = 1 << 25


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """−log softmax(hidden weightᵀ)[target], for every token, without logits of tokens × vocabulary.

    The gradients are computed in the forward pass, chunk by chunk, and kept for the backward pass. In memory are a
    chunk of logits (1 GiB on a GPU, 32 MiB elsewhere), a gradient like ``hidden`` and one like ``weight`` in float32.
    Nothing is computed for what requires no gradient. Logits and their gradients have the dtype of ``hidden``, or
    autocast's where it is on; maxima, sums, losses and the sum of the weight's gradient over chunks are float32
    (float64 for float64). This is one operator for ``torch.compile``. There is no second derivative.

    Args:
        hidden: [..., D] of a floating dtype.
        weight: [V, D], of the dtype of ``hidden`` except under autocast; V is the size of the vocabulary.
        targets: [...] integers of [0, V), or ``ignore_index``: such a token has no loss and no gradient.
        ignore_index: any integer.
        reduction: "mean", over the tokens that are not ignored (NaN where there is none); "sum"; or "none", which has
            no gradient.

    Returns:
        A scalar, or the losses [...] with "none"; float32, or float64 for float64 inputs.

    Raises:
        ValueError: shapes or devices that do not match; a reduction not among these; "none" where ``hidden`` or
            ``weight`` requires a gradient; on a CPU, a target out of range. On a GPU its loss is NaN.
        TypeError: what is no dense tensor; dtypes that do not match or are not such; a weight that is a DTensor.
    """
    _check(hidden, weight, targets, reduction)
    need = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    if reduction == "none" and any(need):
        raise ValueError("reduction is 'none', and hidden or weight requires a gradient; it must be 'mean' or 'sum'")
    dtype = _autocast_dtype(hidden)
    if dtype is None:
        dtype = hidden.dtype
        if weight.dtype != dtype:
            raise TypeError(f"weight is {weight.dtype}; it must be {dtype} as hidden is, or autocast be on")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    total, losses, *_ = _linear_cross_entropy(rows, weight, flat, ignore_index, dtype, *need)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        validation.check_tensor(name, x)
    for name, x in (("hidden", hidden), ("weight", weight)):
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}; it must be of a floating dtype")
        if hasattr(x, "device_mesh"):
            raise TypeError(f"{name} is a DTensor; it must be whole on every rank")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets is {targets.dtype}; it must hold integers")
    if weight.ndim != 2 or not hidden.ndim or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight is {list(weight.shape)}, hidden {list(hidden.shape)}; they must be [V, D], [..., D]")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets is {list(targets.shape)}; it must be {list(hidden.shape[:-1])}")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {hidden.device}, as hidden is")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    # First whether there is any: not every device has autocast, and the compiler of torch 2.11 cannot ask which have.
    if x.dtype == torch.float64 or x.is_meta or not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def compute(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype, need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of the losses, the losses [N], and the sum's gradients, without elements where they are not needed.

    ``hidden`` [N, D] and ``weight`` [V, D] are cast to ``dtype``, and hidden's gradient has it; that of the weight is
    in the type of the sums. They are scaled in the backward pass: 16 bits need not hold a mean's.
    """
    V = weight.shape[0]
    if targets.device.type == "cpu":
        wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
        if len(wrong):
            raise ValueError(f"targets has {int(wrong[0])}; a target must be in [0, {V}) or {ignore_index}")
    by_triton = hidden.device.type == "cuda" and backends.HAS_TRITON and dtype != torch.float64
    cross_entropy = backends.get("triton" if by_triton else "tiled").cross_entropy
    assert cross_entropy is not None
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    losses, dhidden, dweight = _results(hidden, weight, targets, dtype, need_dhidden, need_dweight)
    dweight.zero_()
    most = max(BUDGETS.get(hidden.device.type, BUDGET) // (V * dtype.itemsize), 1)
    memory: Tensor | None = None
    for chunk in chunks(len(targets), most):
        some = hidden[chunk]
        memory = hidden.new_empty(len(some), V) if memory is None else memory
        logits = torch.mm(some, weight.t(), out=memory[: len(some)])
        losses[chunk] = cross_entropy(logits, targets[chunk], ignore_index, need_dhidden or need_dweight)
        if need_dhidden:
            torch.mm(logits, weight, out=dhidden[chunk])
        if need_dweight:
            _add_product(dweight, logits.t(), some)
    return losses.sum(), losses, dhidden, dweight


def _results(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, need_dhidden: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the losses and the gradients."""
    sums = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty(targets.shape, dtype=sums),
        hidden.new_empty(hidden.shape if need_dhidden else (0,), dtype=dtype),
        hidden.new_empty(weight.shape if need_dweight else (0,), dtype=sums),
    )


def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype, *need: bool  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    losses, dhidden, dweight = _results(hidden, weight, targets, dtype, *need)
    return losses.new_empty(()), losses, dhidden, dweight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [x.dtype if needed else None for x, needed in zip(inputs[:2], inputs[-2:], strict=True)]


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(x is not None for x in others):
        raise RuntimeError("linear_cross_entropy has no second derivative")
    gradients = [
        None if dtype is None or grad is None else (x.to(torch.promote_types(x.dtype, dtype)) * grad).to(dtype)
        for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return *gradients, *(None,) * 5


_linear_cross_entropy = torch.library.custom_op("lightning_attention::linear_cross_entropy", compute, mutates_args=())
_linear_cross_entropy.register_fake(_fake)
_linear_cross_entropy.register_autograd(_backward, setup_context=_setup)


def chunks(tokens: int, most: int) -> Iterator[slice]:
    """Split all tokens into as few chunks as possible of at most so many, all of one size but the last."""
    size = -(-tokens // -(-tokens // most)) if tokens else 1
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to a sum whose type may be wider than theirs."""
    if to.dtype == a.dtype:
        to.addmm_(a, b)
    elif a.dtype == torch.float16:
        # A sum over thousands of tokens may pass 65504, which the mean's gradient does not.
        to.add_(torch.mm(a, b * 2.0**-6), alpha=2.0**6)
    else:
        to.add_(torch.mm(a, b))
