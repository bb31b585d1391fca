"""What goes wrong first in kernels of linear attention: float16's range, strong and slow decays, strided vectors.

In the interpreter, so in float32 and float16; ``gpu/test_numerics.py`` has the same at full length on a GPU.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from lightning_attention import decay
from tests.kernels.triton.support import serving
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.prefilling import assert_right, make_batch, prefilled
from tests.support import Problem, Solution, make_problem, misses, relative_error, solve_exactly

pytestmark = interpreted
FP16, FP32 = torch.float16, torch.float32
NO_MEMORY = [-float("inf"), torch.finfo(FP32).min, -1e30]


def strided(x: Tensor) -> Tensor:
    """The same numbers, every other one of a tensor full of others."""
    return torch.stack([x, torch.full_like(x, -7)], -1)[..., 0]


def test_strided_decays_and_boundaries(interpreter: Interpreter):
    segments = True  # more kernels than without are given them
    problem = make_problem(lengths=[20, 0, 35], padding=3, index_dtype=torch.int32)
    expected = interpreter.solve(problem, segments=segments).solution
    got = interpreter.call(_solve_strided, problem, segments)
    one_rate = replace(problem, log_decay=torch.full((2,), -0.3))
    expanded = interpreter.call(_solve_strided, replace(one_rate, log_decay=torch.tensor([-0.3])), segments)
    same = interpreter.solve(one_rate, segments=segments).solution
    for field in fields(Solution):
        assert torch.equal(getattr(got, field.name), getattr(expected, field.name)), field.name
        assert torch.equal(getattr(expanded, field.name), getattr(same, field.name)), field.name


def _solve_strided(problem: Problem, segments: bool) -> Solution:
    """Strides do not survive pickling: made here."""
    from tests.kernels.triton.support.interpreter import _solve

    rate = problem.log_decay
    rate = rate.expand(problem.q.shape[2]) if rate.numel() == 1 else strided(rate)
    views = replace(problem, log_decay=rate, cu_seqlens=strided(problem.cu_seqlens))
    assert not views.cu_seqlens.is_contiguous()
    assert not views.log_decay.is_contiguous()
    return _solve(views, segments, False, True).solution


@pytest.mark.parametrize("segments", [False, True])
def test_float16_states_may_be_larger_than_float16(interpreter: Interpreter, segments: bool):
    """The states and their gradients pass 65504 by far, what comes of them does not."""
    problem = make_problem(T=150, dtype=FP16, kind="none", scale=0.5)
    problem = replace(
        problem, q=problem.q * 1e-3, k=problem.k * 1e-3, v=problem.v * 1e-3, dout=problem.dout * 1e-3,
        initial_state=problem.initial_state * 1e6, dfinal=problem.dfinal * 1e6,
    )  # fmt: skip
    got = interpreter.solve(problem, segments=segments).solution
    assert min(float(got.final_state.abs().max()), float(got.initial_state.abs().max())) > 1e6
    assert not misses(got, problem)


def test_the_gradient_of_a_slow_decay_in_float16(interpreter: Interpreter):
    """R = ∂S/∂log λ grows like T^1.5, past float16 here at T = 1024."""
    problem = make_problem(T=1024, H=1, dtype=FP16, scale=0.25, initial=False)
    problem = replace(problem, log_decay=decay.transnormer(8, 23, 24)[:1], dfinal=problem.dfinal * 0)
    got = interpreter.solve(problem, final=False).solution
    assert not replace(got, final_state=solve_exactly(problem).final_state).misses(
        solve_exactly(problem), solve_exactly(problem.absolute())
    )


@pytest.mark.parametrize("scale", [1.0, 0.1, -3.0])
@pytest.mark.parametrize("rate", [-8.0, -15.0, -40.0])
def test_strong_decays_in_float16(interpreter: Interpreter, rate: float, scale: float):
    """λ · scale weighs a state's gradient, and float16 holds nothing below 6e-8."""
    problem = make_problem(T=70, H=1, dtype=FP16, scale=scale)
    problem = replace(problem, log_decay=torch.tensor([rate]), dfinal=problem.dfinal * 0)
    got = interpreter.solve(problem, segments=True).solution
    assert not misses(got, problem)
    size = solve_exactly(problem).initial_state
    assert relative_error(got.initial_state, size) < 6.25e-4  # of itself, however small


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("segments", [False, True])
def test_no_memory(interpreter: Interpreter, segments: bool, dtype: torch.dtype):
    problem = make_problem(T=150, H=4, dtype=dtype)
    problem = replace(problem, log_decay=torch.tensor([*NO_MEMORY, -0.1]))
    got = interpreter.solve(problem, segments=segments).solution
    finite = replace(problem, log_decay=torch.tensor([-500.0, -500.0, -500.0, -0.1]))
    assert not got.log_decay[:3].any()
    expected, magnitude = solve_exactly(finite), solve_exactly(finite.absolute())
    assert not got.misses(expected, magnitude)
    assert not got.initial_state[:, :3].any()


def test_no_memory_in_serving(interpreter: Interpreter):
    rate = torch.tensor([NO_MEMORY[0], NO_MEMORY[1]])
    batch = replace(make_batch([70, 1, 5], snapshots=[[(64, 5)], [(0, -1)], [(0, -1)]], rows=7), log_decay=rate)
    assert_right(batch, *interpreter.call(prefilled, batch, True))
    for operation, table, name in (
        ("decode", serving.DECODED, "identity"),
        ("verify", serving.VERIFIED, "trees"),
        ("commit", serving.COMMITTED, "all"),
    ):
        call = serving.case(table, name)
        call = replace(call, log_decay=rate[[0, 1] * (call.k.shape[1] // 2)])
        serving.assert_right(operation, call, *interpreter.call(serving.with_kernels, operation, call))


@pytest.mark.parametrize("rate", [-3.9e-8, -5e-6])
def test_a_slow_decay_does_not_drift(interpreter: Interpreter, rate: float):
    """Rounded in every block of 16, λ^16 was off by 6.6e-6 after 4096 rows, and more after more."""
    problem = make_problem(T=2048, H=1)
    problem = replace(problem, log_decay=torch.tensor([rate]), k=problem.k * 0, v=problem.v * 0)
    final = interpreter.call(_final_state, problem)
    assert relative_error(final, problem.initial_state * torch.tensor(rate * 2048, dtype=torch.float64).exp()) < 2e-7


def _final_state(p: Problem) -> torch.Tensor:
    from lightning_attention.kernels.triton.attention import attention

    return attention(p.q, p.k, p.v, p.log_decay, p.initial_state, p.cu_seqlens, p.scale, True, False)[1]


def test_a_decoded_state_decays_by_less_than_a_rounding(interpreter: Interpreter):
    """λ S rounds to S at 4e-8 a token; with what comes in, the sum does not."""
    final = interpreter.call(_decode_many, 1500)
    rate, k = torch.tensor(-4e-8, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float32).double()
    age = torch.arange(1500, dtype=torch.float64)
    # From 1, each token adds 1e-3, and takes 4e-8 of all: 6e-5 at the end.
    expected = (rate * 1500).exp() + (k * (rate * age).exp()).sum()
    assert abs(float(final.double() / expected) - 1) < 3e-6


def _decode_many(tokens: int) -> Tensor:
    from lightning_attention.kernels.triton.decode import decode

    one, k = torch.ones(1, 1, 1), torch.full((1, 1, 1), 1e-3)
    state, rate = torch.ones(1, 1, 1, 1), torch.tensor([-4e-8])
    for _ in range(tokens):
        decode(one, k, one, rate, state, None, 1.0, False)
    return state.squeeze()


def test_a_positive_decay_is_what_it_says(interpreter: Interpreter):
    """Nobody checks it on a GPU."""
    assert float(interpreter.call(_decode_growing)) == pytest.approx(float(torch.tensor(3.0).exp()), rel=1e-6)


def _decode_growing() -> Tensor:
    from lightning_attention.kernels.triton.decode import decode

    zero, state = torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1)
    decode(zero, zero, zero, torch.tensor([3.0]), state, None, 1.0, False)
    return state.squeeze()
