"""The linear cross entropy on the GPU that is here: against float64, its memory, in CUDA graphs, compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attention.nn import linear_cross_entropy
from tests.kernels.triton.support.device import DEVICE, needs_gpu, no_waiting, room_for
from tests.support.calls import MODULE
from tests.support.numerics import relative_error

pytestmark = needs_gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the gradients; a loss is float32's sum of what rounded logits give. Two units of roundoff: logits of 2 to 10 are
# rounded, and their errors are those of exponents.
ALLOWED = {FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}


def make(tokens: int, D: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, D, generator=generator, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, device=DEVICE).mul(2 * D**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (tokens,), generator=generator, device=DEVICE)
    targets[::7] = -100
    targets[-1] = V - 1
    return hidden, weight, targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(h @ w.T, targets)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize("V", [97, 4096, 50_257, 64_000])
@pytest.mark.parametrize("dtype", ALLOWED)
def test_against_float64(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, V: int) -> None:
    room_for(12)
    hidden, weight, targets = make(3001, 256, V, dtype)
    wanted = exact(hidden, weight, targets)
    for budget in (1 << 30, 700 * V * dtype.itemsize):  # one chunk, and five
        monkeypatch.setitem(MODULE.BUDGETS, "cuda", budget)
        loss = linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss.dtype == FP32
        assert relative_error(loss, wanted[0]) <= (1e-6 if dtype == FP32 else 1e-4)
        for got, right in zip(gradients, wanted[1:], strict=True):
            assert got.dtype == dtype
            assert relative_error(got, right) <= ALLOWED[dtype]


def test_float64_goes_by_pytorch() -> None:
    hidden, weight, targets = make(300, 64, 1000, torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets)
    got, wanted = (loss, *torch.autograd.grad(loss, (hidden, weight))), exact(hidden, weight, targets)
    assert all(relative_error(a, b) <= 1e-13 for a, b in zip(got, wanted, strict=True))


def test_autocast_and_frozen_parts() -> None:
    hidden, weight, targets = make(2000, 128, 5000, FP32)
    wanted = exact(hidden, weight, targets)
    with torch.autocast(DEVICE, BF16):
        loss = linear_cross_entropy(hidden, weight, targets)
        alone = linear_cross_entropy(hidden.detach(), weight, targets)
        frozen = linear_cross_entropy(hidden, weight.detach(), targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for got, right in zip((loss, *gradients), wanted, strict=True):
        assert got.dtype == FP32
        assert relative_error(got, right) <= ALLOWED[BF16]
    assert torch.equal(torch.autograd.grad(alone, weight)[0], gradients[1])
    assert torch.equal(torch.autograd.grad(frozen, hidden)[0], gradients[0])


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 32,768 tokens of 32,000 the logits would be 2.1 GB, and float32 copies of them 4.2."""
    room_for(4)
    monkeypatch.setitem(MODULE.BUDGETS, "cuda", 1 << 28)
    hidden, weight, targets = make(32_768, 512, 32_000, BF16)
    linear_cross_entropy(hidden, weight, targets).backward()  # libraries take their workspaces
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets).backward()
    # Of hidden two gradients, of weight one in float32, two products and what backward makes of it; a chunk.
    elements = 2 * 2 * hidden.numel() + 16 * weight.numel() + (1 << 28)
    assert torch.cuda.max_memory_allocated() - before <= elements + (1 << 24)


def test_the_host_does_not_wait() -> None:
    hidden, weight, targets = make(500, 64, 5000, BF16)
    linear_cross_entropy(hidden, weight, targets).backward()
    with no_waiting():
        linear_cross_entropy(hidden, weight, targets).backward()


def test_a_target_out_of_range_shows() -> None:
    hidden, weight, targets = make(50, 64, 97, FP32)
    targets[3], targets[5] = 97, -1
    losses = linear_cross_entropy(hidden.detach(), weight.detach(), targets, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled() -> None:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, targets)

    torch._dynamo.reset()
    hidden, weight, targets = make(1000, 64, 5000, BF16)
    loss, wanted = torch.compile(run, fullgraph=True)(hidden, weight, targets), run(hidden, weight, targets)
    assert torch.equal(loss, wanted)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, wanted)), strict=True):
        assert relative_error(a, b) <= 2e-3


def test_more_logits_in_a_chunk_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(30)
    monkeypatch.setitem(MODULE.BUDGETS, "cuda", 1 << 40)
    hidden, weight, targets = make(40_000, 16, 64_000, BF16)
    assert len(hidden) * len(weight) > 2**31
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none")[-100:]
        wanted = F.cross_entropy(hidden[-100:].double() @ weight.double().T, targets[-100:], reduction="none")
    assert relative_error(losses, wanted) <= 2e-3
