"""How far a result may lie from a float64 oracle."""

import torch
from torch import Tensor

# Relative Frobenius error of outputs and states, and of gradients. float32: 34 and 168 units of roundoff (2^-24), for
# sums over the channels, a block, and the blocks. Half precision is computed in float32 and rounded once, when stored:
# that costs 0.85 units (2^-9, 2^-12) of random numbers, and 2.6 units leave no room for states kept in half precision.
_BUDGETS = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 1e-5),
    torch.float16: (6.25e-4, 6.25e-4),
    torch.bfloat16: (5e-3, 5e-3),
}


def budget(dtype: torch.dtype, *, gradient: bool = False) -> float:
    """The relative error allowed for inputs of this dtype, where a sum does not cancel."""
    return _BUDGETS[dtype][gradient]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64, nan where anything is not finite; ‖actual‖ where that is 0 / 0."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    size = _norm(expected)
    return _norm(actual.detach().double() - expected.detach().double()) / (size if size > 0 else 1.0)


def budget_used(
    actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype, *, gradient: bool = False
) -> float:
    """‖actual − expected‖ as a fraction of what inputs of ``dtype`` allow: right is ≤ 1, nan is not.

    To the budget relative to ``expected`` comes that of the arithmetic, eight units of roundoff (float32; float64 for
    float64 inputs) relative to ``magnitude``, the same sums without cancellation: sums that happen to end near zero, as
    sums of few terms do, have a large relative error in any arithmetic.
    """
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    allowed = budget(dtype, gradient=gradient) * _norm(expected) + 8 * unit * _norm(magnitude)
    return relative_error(actual, expected) * (_norm(expected) or 1.0) / (allowed or 1e-300)


def _norm(x: Tensor) -> float:
    return x.detach().double().norm().item()
