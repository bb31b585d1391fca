"""Against the definition in float64: losses, gradients, memory; compiled, under autocast and checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_attention.nn import linear_cross_entropy
from lightning_attention.nn.linear_cross_entropy import chunks
from tests.support.calls import MODULE as module
from tests.support.calls import Calls
from tests.support.numerics import relative_error

N, D, V = 210, 24, 301
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Two roundings of 16-bit numbers on top of the logits', which both sides have.
ALLOWED = {FP64: 1e-13, FP32: 1e-6, FP16: 1e-3, BF16: 8e-3}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 tokens at a time in float32: the last chunk has fewer."""
    monkeypatch.setattr(module, "BUDGET", 40 * V * 4)


def make(dtype: torch.dtype = FP32, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, N // 3, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).mul(0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (3, N // 3), generator=generator)
    targets[:, ::5] = ignore_index
    targets[1, :64] = ignore_index  # a chunk with nothing to learn
    return hidden, weight, targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Any:
    """Loss and gradients by the definition, in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (h @ w.T).flatten(0, -2)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (h, w))


def assert_right(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], allowed: float) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert relative_error(x, y) <= allowed
    assert all(relative_error(torch.zeros_like(x), x) == 1 for x in got)  # there is something to be right about


def test_chunks_cover_all_tokens_once() -> None:
    for tokens in range(40):
        for most in range(1, 42):
            cut = list(chunks(tokens, most))
            assert [i for x in cut for i in range(x.start, x.stop)] == list(range(tokens))
            assert len(cut) == -(-tokens // most)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 5, 10**6])
@pytest.mark.parametrize("dtype", ALLOWED)
def test_against_float64(dtype: torch.dtype, ignore_index: int, reduction: str) -> None:
    hidden, weight, targets = make(dtype, ignore_index)
    loss = linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index, reduction=reduction)
    assert loss.dtype == torch.promote_types(dtype, FP32)
    gradients = torch.autograd.grad(loss * 3, (hidden, weight))
    assert [g.dtype for g in gradients] == [dtype, dtype]
    wanted = exact(hidden, weight, targets, ignore_index, reduction)
    assert_right((loss, *gradients), (wanted[0], *(3 * g for g in wanted[1:])), ALLOWED[dtype])
    assert not gradients[0][targets == ignore_index].any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_costs_nothing(frozen: str) -> None:
    hidden, weight, targets = make()
    _, dhidden, dweight = exact(hidden, weight, targets)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    with Calls() as seen:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (frozen != "both")
    products = sum("mm" in name for name, _ in seen.calls)
    assert products == 6 * (2 - (frozen == "both"))  # chunks
    if frozen != "both":
        loss.backward()
        given, wanted = (hidden, dhidden) if frozen == "weight" else (weight, dweight)
        assert relative_error(given.grad, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_tensor_has_tokens_times_vocabulary(dtype: torch.dtype) -> None:
    hidden, weight, targets = make(dtype)
    with Calls() as seen:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert seen.largest <= max(V * D, module.BUDGET // dtype.itemsize) < N * V / 2
    with Calls() as seen:
        F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten()).backward()
    assert seen.largest >= N * V


def test_autocast() -> None:
    """Products in bfloat16; the gradient of a float32 weight is summed and kept in float32."""
    hidden, weight, targets = make()
    with torch.autocast("cpu", BF16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == FP32
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in gradients] == [FP32, FP32]
    assert relative_error(gradients[1], gradients[1].to(BF16)) > 1e-4
    assert_right((loss, *gradients), exact(hidden, weight, targets), ALLOWED[BF16])
    with torch.autocast("cpu", BF16):  # as a body under autocast leaves them; as float64 is left alone
        assert torch.equal(linear_cross_entropy(hidden.bfloat16(), weight, targets), loss)
        hidden, weight = hidden.detach().double(), weight.detach().double()
        assert relative_error(linear_cross_entropy(hidden, weight, targets), exact(hidden, weight, targets)[0]) < 1e-14


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_in_one_graph(frozen: bool, autocast: bool) -> None:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16, enabled=autocast):
            return linear_cross_entropy(hidden * 2, weight, targets)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    hidden, weight, targets = make()
    weight.requires_grad_(not frozen)
    wanted_by = (hidden,) if frozen else (hidden, weight)
    got, wanted = (f(hidden, weight, targets) for f in (compiled, run))
    assert torch.equal(got, wanted)
    for x, y in zip(torch.autograd.grad(got, wanted_by), torch.autograd.grad(wanted, wanted_by), strict=True):
        assert relative_error(x, y) <= 1e-6
    with torch.no_grad():
        assert torch.equal(compiled(hidden, weight, targets), wanted)


def test_as_an_operator() -> None:
    hidden, weight, targets = make()
    args = (hidden.detach()[0], weight, targets[0], -100, FP32, True, True)
    torch.library.opcheck(
        module._linear_cross_entropy, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    hidden, weight, targets = make()
    loss = checkpoint(linear_cross_entropy, hidden, weight, targets, use_reentrant=reentrant)
    loss.backward()
    assert_right((loss, hidden.grad, weight.grad), exact(hidden, weight, targets), 1e-6)


def test_backward_twice_and_never_to_the_second_derivative() -> None:
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_losses_of_tokens() -> None:
    hidden, weight, targets = make()
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
        logits = (hidden.double() @ weight.double().T).flatten(0, 1)
    assert relative_error(losses.flatten(), F.cross_entropy(logits, targets.flatten(), reduction="none")) <= 1e-6


def test_a_sum_past_the_range_of_float16() -> None:
    """The weight's gradient is one of a sum, which one token that always comes makes as large as there are tokens."""
    hidden = torch.full((2**13, 2), 16.0, dtype=FP16, requires_grad=True)
    weight = torch.zeros(8, 2, dtype=FP16, requires_grad=True)
    targets = torch.zeros(2**13, dtype=torch.long)
    module.BUDGET = 1 << 20  # one chunk; the fixture undoes it
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert torch.finfo(FP16).max < 2**13 * 16 * 7 / 8
    assert_right((weight.grad,), exact(hidden, weight, targets)[2:], 1e-3)


def test_nothing_to_learn() -> None:
    hidden, weight, targets = make()
    empty = hidden[:, :0], weight, targets[:, :0]
    for batch in (empty, (hidden, weight, torch.full_like(targets, -100))):
        loss = linear_cross_entropy(*batch, reduction="sum")
        assert loss == 0
        assert not torch.autograd.grad(loss, weight)[0].any()
        assert linear_cross_entropy(*batch).isnan()


def _changed(index: int, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    batch = list(make())
    batch[index] = change(batch[index].detach())
    return batch


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (_changed(0, lambda x: x[..., 1:]), ValueError, r"weight is \[301, 24\], hidden \[3, 70, 23\]"),
        (_changed(1, lambda x: x[0]), ValueError, r"weight is \[24\]"),
        (_changed(2, lambda x: x[:, 1:]), ValueError, r"targets is \[3, 69\]; it must be \[3, 70\]"),
        (_changed(2, lambda x: x.clamp(min=0) + V), ValueError, r"targets has 301; .* \[0, 301\) or -100"),
        (_changed(2, lambda x: x.float()), TypeError, "targets is torch.float32; it must hold integers"),
        (_changed(1, lambda x: x.bfloat16()), TypeError, "weight is torch.bfloat16; it must be torch.float32"),
        (_changed(0, lambda x: x.long()), TypeError, "hidden is torch.int64"),
        (_changed(2, lambda x: x.tolist()), TypeError, "targets is a list; it must be a tensor"),
        (_changed(1, lambda x: x.to("meta")), ValueError, "weight is on meta; it must be on cpu"),
    ],
)
def test_what_is_refused(batch: list[Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        linear_cross_entropy(*batch)


def test_a_reduction_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="reduction is 'average'; it must be 'mean', 'sum' or 'none'"):
        linear_cross_entropy(*make(), reduction="average")
    with pytest.raises(ValueError, match="reduction is 'none', and hidden or weight requires a gradient"):
        linear_cross_entropy(*make(), reduction="none")
