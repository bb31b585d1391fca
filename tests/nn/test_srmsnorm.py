import pytest
import torch

from lightning_attention.nn import SRMSNorm
from tests.support.numerics import relative_error


def formula(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


# Rounding the output once costs up to 2^-9 (bfloat16) and 2^-12 (float16) of it; float32 a few units of 2^-24.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.bfloat16, 2**-9), (torch.float16, 2**-12)]
)
def test_is_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    x = (5 * torch.randn(3, 7, 96)).to(dtype)
    assert relative_error(SRMSNorm()(x), formula(x)) <= tolerance
    assert SRMSNorm()(x).dtype == dtype


def test_the_mean_is_not_subtracted_and_eps_is_inside_the_root() -> None:
    x = torch.full((2, 4), 3.0)
    torch.testing.assert_close(SRMSNorm()(x), torch.ones(2, 4), rtol=1e-6, atol=0)
    tiny = torch.full((1, 4), 1e-3)  # mean square 1e-6: eps halves it
    torch.testing.assert_close(SRMSNorm()(tiny), torch.full((1, 4), 0.5**0.5), rtol=1e-6, atol=0)


def test_squares_do_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(SRMSNorm()(x), torch.ones(1, 8, dtype=torch.float16))


def test_gradient() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SRMSNorm(), (x,))


def test_has_no_parameters() -> None:
    assert not list(SRMSNorm().state_dict())
