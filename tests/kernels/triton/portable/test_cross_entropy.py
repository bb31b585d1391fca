"""The kernel of the cross entropy in Triton's interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.support.numerics import relative_error

pytestmark = interpreted
FP16, FP32 = torch.float16, torch.float32


def run(logits: Tensor, targets: Tensor, ignore_index: int, need_gradient: bool) -> tuple[Tensor, Tensor]:
    from lightning_attention.kernels.triton.cross_entropy import cross_entropy

    losses = cross_entropy(logits, targets, ignore_index, need_gradient)
    return losses, logits


def exact(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, targets, ignore_index=ignore_index, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


def make(V: int, dtype: torch.dtype, ignore_index: int, size: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(7, V, generator=generator).mul(size).to(dtype)
    targets = torch.randint(0, V, (7,), generator=generator)
    targets[-1] = V - 1
    targets[[1, 4]] = ignore_index
    return logits, targets


@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("V", [1, 97, 4096, 9001])
def test_against_float64(interpreter: Interpreter, V: int, dtype: torch.dtype, ignore_index: int) -> None:
    logits, targets = make(V, dtype, ignore_index)
    losses, gradient = interpreter.call(run, logits.clone(), targets, ignore_index, True)
    wanted, dlogits = exact(logits, targets, ignore_index)
    assert losses.dtype == FP32
    assert gradient.dtype == dtype
    assert not losses[targets == ignore_index].any()
    assert not gradient[targets == ignore_index].any()
    if V == 1:
        assert losses.abs().max() < 1e-6
        assert gradient.abs().max() < 1e-6
        return
    assert relative_error(losses, wanted) < 1e-6
    assert relative_error(gradient, dlogits) < (1e-6 if dtype == FP32 else 5e-4)


def test_without_a_gradient_the_losses_are_the_same(interpreter: Interpreter) -> None:
    logits, targets = make(5000, FP32, -100)
    assert torch.equal(
        interpreter.call(run, logits.clone(), targets, -100, False)[0],
        interpreter.call(run, logits.clone(), targets, -100, True)[0],
    )


@pytest.mark.parametrize("size", [1e4, 1e-3])
def test_large_and_small_logits(interpreter: Interpreter, size: float) -> None:
    logits, targets = make(4500, FP32, -100, size)
    logits[0, 4200:] = -torch.inf  # tokens that may never come
    targets[0] = 17
    losses, gradient = interpreter.call(run, logits.clone(), targets, -100, True)
    wanted, dlogits = exact(logits, targets, -100)
    assert relative_error(losses, wanted) < 1e-6
    assert relative_error(gradient, dlogits) < 1e-6
    assert not gradient[0, 4200:].any()


@pytest.mark.parametrize("wrong", [-1, 97, 2**40])
def test_a_target_out_of_range_shows(interpreter: Interpreter, wrong: int) -> None:
    """Nobody looks at targets on a GPU: the loss of such a token is NaN, and so is its gradient; no others' are."""
    logits, targets = make(97, FP32, -100)
    targets[2] = wrong
    losses, gradient = interpreter.call(run, logits, targets, -100, True)
    assert losses.isnan().tolist() == [i == 2 for i in range(7)]
    assert gradient.isnan().all(1).tolist() == losses.isnan().tolist()
    assert gradient.isnan().any(1).tolist() == losses.isnan().tolist()


def test_nothing(interpreter: Interpreter) -> None:
    losses, _ = interpreter.call(run, torch.empty(0, 97), torch.empty(0, dtype=torch.long), -100, True)
    assert losses.shape == (0,)
    with pytest.raises(TypeError, match=r"logits are torch\.float64"):
        interpreter.call(run, torch.zeros(1, 9, dtype=torch.float64), torch.zeros(1, dtype=torch.long), -100, True)
