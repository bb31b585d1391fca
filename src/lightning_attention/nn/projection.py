"""A linear layer with the norm, gate and activation around it, for the rows of a step of generation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attention.ops import backends
from lightning_attention.ops.operation import Operation


def project(
    x: Tensor,
    weight: Tensor,
    *,
    second: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    silu: int = 0,
) -> Tensor:
    """Products of y = SRMSNorm(x) ⊙ gate: y weightᵀ (⊙ y secondᵀ) (+ residual), without gradients.

    Args:
        x: [N, K].
        weight: [O, K] of x's dtype.
        second: [O, K], another matrix: the product of both results, as in SGLU.
        gate: [N, K], a factor of x, normalised or not.
        residual: [N, O], which is added.
        eps: of a norm of x's rows, without a weight; None leaves x as it is.
        silu: how many of the first columns pass the activation.

    Returns:
        [N, O] in x's dtype. In bfloat16 on a GPU one kernel, up to 8 rows, and on Hopper, up to some hundred, one for
        y and one for what follows: nothing else is rounded. Otherwise by PyTorch, each operation rounding.
    """
    return _operation(x, weight, second, gate, residual, eps, silu)


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer is just its weight: no bias, adapter or hooks, not quantized or sharded."""
    return (
        is_bare(linear, nn.Linear)
        and type(linear.weight) is nn.Parameter  # a tensor of another class computes in its own way
        and linear.bias is None
    )


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class does and nobody watches, so that the call may be left out."""
    return (
        type(module) is kind
        and "forward" not in vars(module)  # accelerate's way to move a module to its device
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def is_watched() -> bool:
    """Whether something other than a compiler watches every module or operation, as a counter of operations does."""
    if torch.compiler.is_compiling():
        return False
    return torch.nn.modules.module._has_any_global_hook() or torch._C._len_torch_dispatch_stack() > 0


def _project(
    x: Tensor, weight: Tensor, second: Tensor | None, gate: Tensor | None, residual: Tensor | None, eps: float | None,
    silu: int,
) -> Tensor:  # fmt: skip
    given = weight, second, gate, residual
    alike = all(other is None or other.dtype == x.dtype for other in given)  # or PyTorch says what does not fit
    # In float16 the product of a gate and what is not normalised yet may overflow.
    if x.is_cuda and backends.HAS_TRITON and x.dtype == torch.bfloat16 and alike:
        kernel = backends.get("triton").project
        assert kernel is not None
        from lightning_attention.kernels.triton.projection import is_faster

        if is_faster(x, weight, second, gate, eps, silu):
            return kernel(x, weight, second, gate, residual, eps, silu)
    return composed(x, weight, second, gate, residual, eps, silu)


def composed(
    x: Tensor, weight: Tensor, second: Tensor | None, gate: Tensor | None, residual: Tensor | None, eps: float | None,
    silu: int,
) -> Tensor:  # fmt: skip
    """:func:`project` of PyTorch's operations."""
    y = x if eps is None else F.rms_norm(x, x.shape[-1:], eps=eps)
    y = y if gate is None else y * gate
    out = F.linear(y, weight)
    if second is not None:
        out = out * F.linear(y, second)
    if silu:
        out[:, :silu] = F.silu(out[:, :silu])
    return out if residual is None else residual + out


_operation = Operation(_project, lambda x, weight, *_: x.new_empty(len(x), len(weight)))
