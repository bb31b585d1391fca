"""float16's range, strong and slow decays and strided vectors on the GPU that is here, at full length."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    decay,
    lightning_attention,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from tests.kernels.triton.support.device import (
    DEVICE,
    assert_same_bits,
    misses,
    moved,
    needs_gpu,
    room_for,
    solve,
    solve_in_float64,
)
from tests.support import Problem, budget, make_problem, relative_error

pytestmark = needs_gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAST = decay.transnormer(8, 23, 24)[[0, 7]]  # of the last layer the fastest and the slowest head


@pytest.mark.parametrize("kind", ["none", "alibi", "strong"])
@pytest.mark.parametrize("D", [64, 128])
def test_float16_at_131072_tokens(D: int, kind: str):
    """States and, for the gradient of log_decay, their derivatives pass 65504 by far."""
    room_for(12)
    problem = make_problem(T=131_072, H=2, D=D, dtype=FP16, kind=kind, scale=D**-0.5)
    # Keys and values of one sign: the state grows like T, and a query finds its mean.
    problem = replace(problem, k=problem.k.abs(), v=problem.v.abs(), q=problem.q * 0.01, dout=problem.dout * 0.01)
    if kind == "none":
        problem = replace(problem, log_decay=torch.zeros(2))
    got, expected = solve(problem), solve_in_float64(problem)
    if kind == "none":
        assert expected.final_state.abs().max() > 65504
    errors = misses(got, expected)
    assert errors.keys() <= {"log_decay"}, errors
    # Sums over 131072 tokens of terms of both signs: of the terms' errors, not of the sum's.
    assert got.log_decay.isfinite().all()
    assert relative_error(got.log_decay, expected.log_decay) < 0.05


def test_the_gradient_of_slow_decays_in_float16():
    problem = replace(make_problem(T=65_536, H=2, D=64, dtype=FP16, scale=0.125), log_decay=LAST)
    got, expected = solve(problem), solve_in_float64(problem)
    assert got.log_decay.isfinite().all()
    assert not misses(got, expected)


@pytest.mark.parametrize("D", [64, 128, 20])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_state_larger_than_float16(D: int, batch_invariant: bool):
    problem = make_problem(T=3000, D=D, dtype=FP16, kind="none", scale=1.0)
    problem = replace(problem, q=problem.q * 1e-4, k=problem.k * 1e-3, initial_state=problem.initial_state * 1e6)
    problem = replace(problem, dout=problem.dout * 1e-2)
    got, expected = solve(problem, batch_invariant=batch_invariant), solve_in_float64(problem)
    for name in ("output", "final_state", "initial_state", "k", "v", "q"):
        wanted = getattr(expected, name)
        if name in "qkv" and wanted.abs().max() > 65504:
            continue  # float16 cannot hold that gradient
        assert relative_error(getattr(got, name), wanted) < 2 * budget(FP16), name


def test_a_prefilled_state_larger_than_float16():
    T, D = 300, 128
    q, k, v = torch.randn(3, T, 1, D, device=DEVICE).to(FP16)
    q, k = q * 1e-4, k * 1e-3
    pool, lengths = torch.randn(2, 1, D, D, device=DEVICE) * 1e6, torch.tensor([0, 100, T], device=DEVICE)
    exact = lightning_attention(
        q[None].double(), k[None].double(), v[None].double(), cu_seqlens=lengths, initial_state=pool.double(),
        backend="tiled",
    ).output[0]  # fmt: skip
    verified = lightning_attention_verify(q, k, v, None, pool, cu_seqlens=lengths)
    assert relative_error(verified, exact) < 2 * budget(FP16)
    out = lightning_attention_prefill(q, k, v, None, pool, cu_seqlens=lengths)
    assert relative_error(out, exact) < 2 * budget(FP16)


@pytest.mark.parametrize("scale", [1.0, 0.1, -3.0])
@pytest.mark.parametrize("rate", [-8.0, -15.0, -40.0])
@pytest.mark.parametrize("D", [64, 20])
def test_strong_decays_in_float16(D: int, rate: float, scale: float):
    problem = make_problem(T=1000, D=D, dtype=FP16, scale=scale)
    problem = replace(problem, log_decay=torch.full((2,), rate), dfinal=problem.dfinal * 0)
    got, expected = solve(problem), solve_in_float64(problem)
    assert not misses(got, expected)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_no_memory(dtype: torch.dtype):
    problem = make_problem(T=3000, H=4, D=64, dtype=dtype)
    rates = [-float("inf"), torch.finfo(FP32).min, -1e30, -0.1]
    got = solve(replace(problem, log_decay=torch.tensor(rates)))
    expected = solve_in_float64(replace(problem, log_decay=torch.tensor([-500.0, -500.0, -500.0, -0.1])))
    assert not misses(got, expected)
    assert not got.log_decay[:3].any()


def test_a_decay_that_is_no_number_shows():
    q = torch.ones(1, 100, 2, 64, dtype=BF16, device=DEVICE)
    out = lightning_attention(q, q, q, torch.tensor([float("nan"), -1.0], device=DEVICE)).output
    assert out[:, :, 0].isnan().all()
    assert out[:, :, 1].isfinite().all()


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("D", [64, 128])
def test_float32_over_its_range(D: int, factor: float):
    """Where a product is several of shorter numbers, these must have its range, and their sum its precision."""
    problem = make_problem(T=700, D=D, scale=D**-0.5)
    problem = replace(
        problem, q=problem.q * factor, k=problem.k / factor, initial_state=problem.initial_state / factor,
        dfinal=problem.dfinal * factor,
    )  # fmt: skip
    assert not misses(solve(problem), solve_in_float64(problem))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinite_float32_shows_and_stays_in_its_head(bad: float):
    problem = make_problem(T=300, H=3, D=64)
    spoilt = replace(problem, k=problem.k.clone(), v=problem.v.clone())
    spoilt.k[:, 150, 1, 3] = bad
    spoilt.v[:, 200, 2, 5] = bad
    clean, got = solve(problem), solve(spoilt)
    assert torch.equal(got.output[:, :, 0], clean.output[:, :, 0])
    assert torch.equal(got.output[:, :128, 1:], clean.output[:, :128, 1:])
    assert not got.output[:, 151:, 1].isfinite().any()
    assert not got.output[:, 201:, 2, 5].isfinite().any()
    assert torch.equal(got.output[:, :, 2, 6:], clean.output[:, :, 2, 6:])


@pytest.mark.parametrize(("T", "batch_invariant"), [(65_536, False), (65_536, True), (1_048_576, False)])
def test_slow_decays_in_float32(T: int, batch_invariant: bool):
    room_for(12)
    problem = replace(make_problem(T=T, H=2, D=32, kind="alibi"), log_decay=LAST)
    q, k, v, rate, start = (x.to(DEVICE) for x in (problem.q, problem.k, problem.v, LAST, problem.initial_state))
    exact = lightning_attention(
        q.double(), k.double(), v.double(), rate, initial_state=start.double(), output_final_state=True, backend="tiled"
    )
    got = lightning_attention(
        q, k, v, rate, initial_state=start, output_final_state=True, batch_invariant=batch_invariant
    )
    assert relative_error(got.output, exact.output) < budget(FP32)
    for head in range(2):
        assert relative_error(got.final_state[:, head], exact.final_state[:, head]) < budget(FP32), head


@pytest.mark.parametrize(("dtype", "allowed"), [(FP32, 1e-6), (FP16, 5e-4), (BF16, 5e-4)])
def test_a_state_that_only_decays(dtype: torch.dtype, allowed: float):
    T = 1_048_576
    zero = torch.zeros(1, T, 2, 64, dtype=dtype, device=DEVICE)
    start = torch.randn(1, 2, 64, 64, device=DEVICE)
    final = lightning_attention(
        zero, zero, zero, LAST.to(DEVICE), initial_state=start, output_final_state=True
    ).final_state
    exact = (LAST.double() * T).exp().to(DEVICE)[:, None, None] * start
    for head in range(2):
        assert relative_error(final[:, head], exact[:, head]) < allowed, head


def test_a_decoded_state_at_32768_tokens():
    """The roundings of one sum a token remain; the decay is exact."""
    torch.manual_seed(0)
    H, D, T, rates = 2, 16, 32_768, torch.tensor([-1.4e-4, -3.9e-8])
    q, k, v = torch.randn(3, T, 1, H, D, device=DEVICE)
    pool = torch.zeros(1, H, D, D, device=DEVICE)
    graph, one = torch.cuda.CUDAGraph(), [x[0].clone() for x in (q, k, v)]
    lightning_attention_decode(*one, rates.to(DEVICE), pool)
    on_device = rates.to(DEVICE)
    with torch.cuda.graph(graph):
        lightning_attention_decode(*one, on_device, pool)
    pool.zero_()
    for t in range(T):
        for x, new in zip(one, (q[t], k[t], v[t]), strict=True):
            x.copy_(new)
        graph.replay()
    exact = lightning_attention(
        *(x.transpose(0, 1).double() for x in (q, k, v)), on_device, output_final_state=True, backend="tiled"
    ).final_state
    for head in range(H):
        assert relative_error(pool[:, head], exact[:, head]) < 2.2e-8 * (T / 2) ** 0.5 * 2, head


def test_strided_decays_and_boundaries():
    problem = make_problem(lengths=[700, 0, 900], padding=3, D=64, H=3, dtype=BF16, index_dtype=torch.int32)
    there = moved(problem)

    def every_other(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, -7)], -1)[..., 0]

    views: Problem = replace(there, log_decay=every_other(there.log_decay), cu_seqlens=every_other(there.cu_seqlens))
    assert_same_bits(solve(views), solve(problem))
