import math

import pytest
import torch
from torch import Tensor

from lightning_attention.nn import LRPE
from tests.support.numerics import relative_error


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def test_initial_frequencies_run_across_the_heads() -> None:
    theta = LRPE(num_heads=4, head_dim=8).theta
    assert theta.shape == (4, 1, 8)
    for head in range(4):
        for i in range(8):
            assert math.isclose(theta[head, 0, i].item(), 10000 ** (-2 * (8 * head + i) / 32), rel_tol=1e-6)


def test_product_is_the_sum_over_channels_of_cosines_of_distances() -> None:
    layer = LRPE(3, 5).double()
    q, k = heads(2, 7, 3, 5, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 9, 40, 41, 100])
    encoded_q, encoded_k = layer(q, k, positions)
    assert encoded_q.shape == (2, 7, 3, 10)
    distance = (positions[:, None] - positions[None, :]).double()
    cosine = torch.cos(distance[:, :, None, None] * layer.theta[:, 0])
    expected = torch.einsum("bthd,bshd,tshd->bhts", q, k, cosine)
    assert relative_error(torch.einsum("bthd,bshd->bhts", encoded_q, encoded_k), expected) <= 1e-13


def test_a_shift_of_all_positions_changes_no_product() -> None:
    layer = LRPE(2, 8).double()
    q, k = heads(1, 6, 2, 8, dtype=torch.float64)
    products = [torch.einsum("bthd,bshd->bhts", *layer(q, k, torch.arange(6) + shift)) for shift in (0, 123_456)]
    assert relative_error(products[1], products[0]) <= 1e-9
    torch.testing.assert_close(layer(q, k, torch.arange(6))[0][:, 0, :, :8], q[:, 0])  # cos 0 = 1
    assert relative_error(layer(q, k, torch.arange(6) + 1)[0], layer(q, k, torch.arange(6))[0]) > 0.1


def test_a_piece_at_an_offset_is_that_piece_of_the_whole() -> None:
    layer = LRPE(2, 8)
    q, k = heads(2, 100, 2, 8)
    whole = layer(q, k, torch.arange(100))
    piece = layer(q[:, 60:], k[:, 60:], torch.arange(60, 100))
    for x, y in zip(whole, piece, strict=True):
        assert torch.equal(x[:, 60:], y)


def test_rows_may_stand_at_different_positions() -> None:
    layer = LRPE(2, 8)
    q, k = heads(3, 10, 2, 8)
    positions = torch.arange(10) + torch.tensor([[0], [7], [500]])
    together = layer(q, k, positions)
    for row in range(3):
        alone = layer(q[row : row + 1], k[row : row + 1], positions[row])
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[row], y[0])


def test_angles_are_float32_for_bfloat16_inputs() -> None:
    layer = LRPE(1, 16)
    ones = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    encoded, _ = layer(ones, ones, torch.tensor([4001]))
    angle = 4001 * layer.theta.double().flatten()
    assert encoded.dtype == torch.bfloat16
    # θt up to 4001 has 2e-4 of float32 rounding and would have 16 of bfloat16 rounding.
    torch.testing.assert_close(encoded.double().flatten(), torch.cat([angle.cos(), angle.sin()]), rtol=0, atol=4e-3)


def test_gradients() -> None:
    layer = LRPE(2, 3).double()
    q, k = (x.requires_grad_() for x in heads(1, 4, 2, 3, dtype=torch.float64))
    positions = torch.arange(5, 9)

    def encode(q: Tensor, k: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(layer, {"theta": theta}, (q, k, positions))

    assert torch.autograd.gradcheck(encode, (q, k, layer.theta))


@pytest.mark.parametrize("positions", [torch.arange(5), torch.zeros(3, 4).long(), torch.zeros(2, 4, 1).long()])
def test_refuses_positions_of_another_shape(positions: Tensor) -> None:
    q, k = heads(2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"positions is .*; it must be \[4\] or \[2, 4\]"):
        LRPE(2, 8)(q, k, positions)


def test_refuses_other_heads() -> None:
    q, k = heads(2, 4, 3, 8)
    with pytest.raises(ValueError, match=r"both must be \[B, T, 2, 8\]"):
        LRPE(2, 8)(q, k, torch.arange(4))
