"""A backend is one object, added in one place: a toy one, by the sum over all pairs, behind the public functions."""

import re
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention
from lightning_attention.kernels.backend import Backend
from lightning_attention.ops import backends
from tests.support import make_problem, relative_error, solve_exactly, solve_with

OPS = torch.ops.lightning_attention
CALLS: list[str] = []


def weights(log_decay: Tensor | None, T: int, H: int) -> Tensor:
    """λ^(t−s) for s ≤ t, [H, T, T]."""
    rate = torch.zeros(H) if log_decay is None else log_decay.float()
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return (rate[:, None, None] * distance.clamp(min=0)).exp().tril()


def attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, batch_invariant: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    CALLS.append("attention")  # torch.compile traces the operator, not what is in it
    if initial_state is not None or cu_seqlens is not None or output_final_state:
        raise NotImplementedError("the toy backend has no states")
    scores = torch.einsum("bthd,bshd->bhts", q, k) * weights(log_decay, *q.shape[1:3])
    return scale * torch.einsum("bhts,bshe->bthe", scores, v).contiguous(), None


def attention_backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, batch_invariant: bool, need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    CALLS.append("attention_backward")
    T, H = q.shape[1:3]
    mask = scale * weights(log_decay, T, H)
    dscores = torch.einsum("bthe,bshe->bhts", dout, v)
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    dq = torch.einsum("bhts,bshd->bthd", dscores * mask, k)
    dk = torch.einsum("bhts,bthd->bshd", dscores * mask, q)
    dv = torch.einsum("bhts,bthe->bshe", scores * mask, dout)
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    dlog_decay = (scores * dscores * mask * distance).sum((0, 2, 3)) if need_dlog_decay else None
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dlog_decay, None


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float,
    batch_invariant: bool, out: Tensor | None,
) -> Tensor:  # fmt: skip
    CALLS.append("decode")
    assert slots is None
    assert out is None
    factor = 1.0 if log_decay is None else log_decay.exp()[:, None, None]
    state.copy_(factor * state + k[..., None] * v[..., None, :])
    return scale * torch.einsum("nhd,nhde->nhe", q, state)


def missing(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it is made for CPUs"


# What it does not have itself it takes from another.
TOY = replace(
    backends.REFERENCE, name="toy", missing=missing, attention=attention, attention_backward=attention_backward,
    decode=decode,
)  # fmt: skip


@pytest.fixture(autouse=True)
def toy() -> Iterator[Backend]:
    CALLS.clear()
    with patch.dict(backends.BACKENDS):
        backends.register(TOY)
        yield TOY
    backends.get.cache_clear()


def test_forward_and_every_gradient():
    problem = make_problem(B=2, T=40, D=8, E=6, initial=False, scale=0.5)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.log_decay)]
    out = lightning_attention(*leaves, scale=0.5, backend="toy").output
    grads = torch.autograd.grad(out, leaves, problem.dout)
    assert CALLS == ["attention", "attention_backward"]
    expected = solve_exactly(replace(problem, dfinal=torch.zeros_like(problem.dfinal)))
    for got, name in zip((out, *grads), ("output", "q", "k", "v", "log_decay"), strict=True):
        assert relative_error(got, getattr(expected, name)) <= 1e-5, name


def test_compiled_and_under_transforms():
    (q, k, v), log_decay = torch.randn(3, 2, 9, 2, 4), decay.alibi(2)
    expected = lightning_attention(q, k, v, log_decay, backend="toy").output

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, log_decay, backend="toy").output

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), expected)
    torch.compiler.reset()
    batched = torch.vmap(run)(*(x[:, None] for x in (q, k, v)))
    assert relative_error(batched[:, 0], expected) <= 1e-6
    assert CALLS == ["attention"] * 3


def test_serving():
    """By the operator: the public functions go to the device's own backend."""
    q, k, v = torch.randn(3, 2, 2, 4)
    pool, log_decay = torch.randn(2, 2, 4, 4), decay.alibi(2)
    same = pool.clone()
    rest = None, 0.5, False, None, None, None, None, None
    got = OPS.decode(q, k, v, log_decay, pool, *rest, "toy")
    assert CALLS == ["decode"]
    assert relative_error(got, OPS.decode(q, k, v, log_decay, same, *rest, "tiled")) <= 1e-6
    assert relative_error(pool, same) <= 1e-6


def test_what_it_takes_from_another():
    problem = make_problem(lengths=[5, 0, 9], dtype=torch.float64)
    args = (problem.k, problem.v, None, problem.cu_seqlens, False, False)
    got, expected = (backends.get(name).states(*args) for name in ("toy", "tiled"))
    assert relative_error(got, expected) <= 1e-13


def test_what_it_does_not_do_is_an_error():
    with pytest.raises(NotImplementedError, match="the toy backend has no states"):
        solve_with(make_problem(T=3), "toy")


def test_what_a_device_lacks_is_an_error():
    q = torch.empty(1, 1, 1, 1, device="meta")
    with pytest.raises(ValueError, match=re.escape("backend is 'toy', but q is on meta; it is made for CPUs")):
        lightning_attention(q, q, q, backend="toy")


def test_it_is_listed():
    q = torch.zeros(1, 1, 1, 1)
    names = "'triton', 'tiled', 'reference', 'toy' or None"
    with pytest.raises(ValueError, match=f"backend is 'Toy'; it must be one of {names}"):
        lightning_attention(q, q, q, backend="Toy")


def test_a_backend_without_an_operation_cannot_be_made():
    with pytest.raises(TypeError, match="commit"):
        Backend(**{name: x for name, x in vars(TOY).items() if name != "commit"})
